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
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        entries=lambda wildcards: campaign.fingerprint(campaign.extensions[int(wildcards.extension)]),
        settings=config["structures"],
        engines=lambda wildcards: campaign.engines_of(int(wildcards.extension)),
    script:
        "../../scripts/structures.py"


rule plan:
    input:
        structures=lambda wildcards: campaign.all_structures(),
        ingested=expand("<results>/displacements/{chunk}.parquet", chunk=campaign.ingested_chunks),
    output:
        table="<results>/plan/plan.csv",
        summary="<results>/plan/summary.txt",
        totals="<results>/plan/totals.json",
    log:
        "<logs>/plan.log",
    benchmark:
        "<benchmarks>/plan.tsv"
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        protocol=campaign.provenance["protocol"],
        engines=campaign.engines,
        gpu_engines=lambda wildcards: ask.gpu_engines,
        born=lambda wildcards: campaign.with_born,
        digest=lambda wildcards: campaign.plan_digest(ask.gpu_engines),
        jobs=lambda wildcards: ask.jobs,
        chunks=campaign.chunks,
        early_verdicts=any(map(campaign.early_verdict, campaign.computed_chunks)),
    script:
        "../../scripts/plan.py"
