rule forces:
    input:
        crystals="<results>/relax/{chunk}/crystals.parquet",
        displacements="<results>/displacements/{chunk}.parquet",
        born=lambda wildcards: list(campaign.born_files(wildcards.chunk).values()),
    output:
        status="<results>/forces/{chunk}/status.parquet",
        forces="<results>/forces/{chunk}/forces.parquet",
    log:
        "<logs>/forces/{chunk}.log",
    benchmark:
        "<benchmarks>/forces/{chunk}.tsv"
    wildcard_constraints:
        chunk=chunks.COMPUTED,
    retries: campaign.retries
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    threads: ask.threads("forces")
    resources:
        mem_mb=ask.mem_mb("forces"),
        runtime=ask.runtime("forces"),
        gpu=ask.gpus("forces"),
    params:
        nac=campaign.section("nac"),
        born=lambda wildcards: campaign.born_files(wildcards.chunk),
        random=campaign.section("displacements")["random"],
        early_verdict=lambda wildcards: campaign.early_verdict(wildcards.chunk),
        engine=lambda wildcards: campaign.engine(wildcards.chunk),
        bulk_folder=lambda wildcards: f"{campaign.jobs}/forces/{wildcards.chunk}",
        max_attempts=lambda wildcards: campaign.max_attempts(wildcards.chunk),
    script:
        "../../scripts/forces.py"
