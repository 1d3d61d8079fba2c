rule frequencies:
    input:
        crystals=lambda wildcards: expand("<results>/relax/{chunk}/crystals.parquet", chunk=campaign.frequency_chunks()),
        status=lambda wildcards: expand(
            "<results>/force_constants/{chunk}/status.parquet", chunk=campaign.frequency_chunks()
        ),
        files=lambda wildcards: expand("<results>/force_constants/{chunk}/files", chunk=campaign.frequency_chunks()),
    output:
        table="<results>/frequencies/frequencies.parquet",
        summary=report(
            "<results>/frequencies/frequencies.csv",
            category="Frequencies",
            labels={"table": "errors by material"},
            caption="../report/frequencies.rst",
        ),
        figures=report(
            directory("<results>/frequencies/figures"),
            patterns=["{engine}_{figure,errors|parity}.svg"],
            category="Frequencies",
            labels={"engine": "{engine}", "figure": "{figure}"},
            caption="../report/frequencies.rst",
        ),
    log:
        "<logs>/frequencies.log",
    benchmark:
        "<benchmarks>/frequencies.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
    params:
        engines=lambda wildcards: {chunk: campaign.engine_name(chunk) for chunk in campaign.frequency_chunks()},
        reference=config["frequencies"]["reference"],
    script:
        "../../scripts/frequencies.py"
