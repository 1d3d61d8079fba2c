rule figures:
    input:
        status="<results>/conductivity/{chunk}/status.parquet",
        kappa="<results>/conductivity/{chunk}/kappa.parquet",
        files="<solved>/{chunk}/files",
    output:
        report(
            directory("<results>/figures/{chunk}"),
            patterns=["{material}_{figure,phonons|kappa}.svg"],
            category="Materials",
            labels={"material": "{material}", "figure": "{figure}"},
            caption="../report/materials.rst",
        ),
    log:
        "<logs>/figures/{chunk}.log",
    benchmark:
        "<benchmarks>/figures/{chunk}.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    resources:
        mem_mb=ask.mem_mb("figures"),
        runtime=ask.runtime("figures"),
    params:
        mesh_length=campaign.protocol.stability.mesh_length,
    script:
        "../../scripts/figures.py"
