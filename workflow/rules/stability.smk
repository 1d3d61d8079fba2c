rule stability:
    input:
        status="<results>/force_constants/{chunk}/status.parquet",
        files="<results>/force_constants/{chunk}/files",
    output:
        status="<results>/stability/{chunk}.parquet",
    log:
        "<logs>/stability/{chunk}.log",
    benchmark:
        "<benchmarks>/stability/{chunk}.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        stability=campaign.section("stability"),
    script:
        "../../scripts/stability.py"
