rule conductivity:
    input:
        crystals="<relaxed>/{chunk}/crystals.parquet",
        files="<solved>/{chunk}/files",
        status="<results>/stability/{chunk}.parquet",
    output:
        **({"modes": directory("<results>/conductivity/{chunk}/modes")} if config["dataset"]["modes"] else {}),
        status="<results>/conductivity/{chunk}/status.parquet",
        kappa="<results>/conductivity/{chunk}/kappa.parquet",
        spectra="<results>/conductivity/{chunk}/spectra.parquet",
    log:
        "<logs>/conductivity/{chunk}.log",
    benchmark:
        "<benchmarks>/conductivity/{chunk}.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    threads: ask.threads("conductivity")
    resources:
        mem_mb=ask.mem_mb("conductivity"),
        runtime=ask.runtime("conductivity"),
    params:
        conductivity=campaign.section("conductivity"),
    script:
        "../../scripts/conductivity.py"
