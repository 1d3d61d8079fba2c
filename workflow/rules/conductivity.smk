rule conductivity:
    input:
        crystals="<results>/relax/{chunk}/crystals.parquet",
        files="<results>/force_constants/{chunk}/files",
        status="<results>/stability/{chunk}.parquet",
    output:
        status="<results>/conductivity/{chunk}/status.parquet",
        kappa="<results>/conductivity/{chunk}/kappa.parquet",
    log:
        "<logs>/conductivity/{chunk}.log",
    benchmark:
        "<benchmarks>/conductivity/{chunk}.tsv"
    resources:
        mem_mb=8000,
        runtime=720,
    params:
        conductivity=campaign.section("conductivity"),
        ledger=config["results"] + "/ledger",
    script:
        "../../scripts/conductivity.py"
