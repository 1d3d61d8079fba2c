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
    conda:
        "../../envs/mlip.yaml"
    resources:
        mem_mb=4000,
        runtime=120,
    params:
        materials=lambda wildcards: campaign.chunks[wildcards.chunk],
        relax=campaign.section("relax"),
        structures=config["structures"],
        engine=config["engine"],
        ledger=campaign.ledger,
    script:
        "../../scripts/relax.py"
