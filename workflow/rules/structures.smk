rule structures:
    input:
        files=lambda wildcards: campaign.files(campaign.extensions[int(wildcards.extension)]),
        before=lambda wildcards: campaign.structures_before(int(wildcards.extension)),
    output:
        structures="<results>/structures/{extension}.parquet",
    log:
        "<logs>/structures/{extension}.log",
    benchmark:
        "<benchmarks>/structures/{extension}.tsv"
    conda:
        "../../envs/mlip.yaml"
    params:
        entries=lambda wildcards: campaign.fingerprint(campaign.extensions[int(wildcards.extension)]),
        settings=config["structures"],
        engines=lambda wildcards: campaign.engines_of(int(wildcards.extension)),
    script:
        "../../scripts/structures.py"


rule plan:
    input:
        structures=campaign.structures(),
    output:
        table="<results>/plan/plan.csv",
        summary="<results>/plan/summary.txt",
    log:
        "<logs>/plan.log",
    benchmark:
        "<benchmarks>/plan.tsv"
    conda:
        "../../envs/mlip.yaml"
    params:
        protocol=campaign.provenance["protocol"],
        engines=campaign.engines,
    script:
        "../../scripts/plan.py"
