rule relax:
    input:
        structures=lambda wildcards: campaign.structures(wildcards.chunk),
    output:
        crystals="<results>/relax/{chunk}/crystals.parquet",
        forces="<results>/relax/{chunk}/forces.parquet",
    log:
        "<logs>/relax/{chunk}.log",
    benchmark:
        "<benchmarks>/relax/{chunk}.tsv"
    wildcard_constraints:
        chunk=chunks.COMPUTED,
    retries: campaign.retries
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    threads: ask.threads("relax")
    resources:
        mem_mb=ask.mem_mb("relax"),
        runtime=ask.runtime("relax"),
        gpu=ask.gpus("relax"),
    params:
        materials=lambda wildcards: campaign.computed_chunks[wildcards.chunk],
        relax=campaign.section("relax"),
        structures=config["structures"],
        engine=lambda wildcards: campaign.engine(wildcards.chunk),
        bulk_folder=lambda wildcards: f"{campaign.jobs}/relax/{wildcards.chunk}",
        max_attempts=lambda wildcards: campaign.max_attempts(wildcards.chunk),
    script:
        "../../scripts/relax.py"
