rule forces:
    input:
        crystals="<results>/relax/{chunk}/crystals.parquet",
        displacements="<results>/displacements/{chunk}.parquet",
    output:
        status="<results>/forces/{chunk}/status.parquet",
        forces="<results>/forces/{chunk}/forces.parquet",
    log:
        "<logs>/forces/{chunk}.log",
    benchmark:
        "<benchmarks>/forces/{chunk}.tsv"
    resources:
        mem_mb=8000,
        runtime=720,
    params:
        engine=config["engine"],
        ledger=config["results"] + "/ledger",
    script:
        "../../scripts/forces.py"
