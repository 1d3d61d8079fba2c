rule displace:
    input:
        structures=ancient("<results>/structures.parquet"),
        crystals="<results>/relax/{chunk}/crystals.parquet",
    output:
        displacements="<results>/displacements/{chunk}.parquet",
    log:
        "<logs>/displace/{chunk}.log",
    benchmark:
        "<benchmarks>/displace/{chunk}.tsv"
    params:
        displacements=campaign.section("displacements"),
    script:
        "../../scripts/displace.py"
