rule structures:
    input:
        files=campaign.files(),
    output:
        structures="<results>/structures.parquet",
    log:
        "<logs>/structures.log",
    benchmark:
        "<benchmarks>/structures.tsv"
    params:
        entries=campaign.fingerprint(),
        settings=config["structures"],
        engine=config["engine"],
    script:
        "../../scripts/structures.py"


rule plan:
    input:
        structures="<results>/structures.parquet",
    output:
        table="<results>/plan/plan.csv",
        summary="<results>/plan/summary.txt",
    log:
        "<logs>/plan.log",
    benchmark:
        "<benchmarks>/plan.tsv"
    params:
        protocol=campaign.provenance["protocol"],
        engine=config["engine"],
    script:
        "../../scripts/plan.py"
