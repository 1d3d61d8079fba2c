rule ladder:
    input:
        structures=lambda wildcards: campaign.structures_with(wildcards.chunk),
        crystals="<results>/relax/{chunk}/crystals.parquet",
        displacements="<results>/displacements/{chunk}.parquet",
        forces="<results>/forces/{chunk}/forces.parquet",
        status="<results>/force_constants/{chunk}/status.parquet",
        files="<results>/force_constants/{chunk}/files",
    output:
        status="<results>/ladder/{chunk}/status.parquet",
        crystals="<results>/ladder/{chunk}/crystals.parquet",
        rungs="<results>/ladder/{chunk}/rungs.parquet",
        forces="<results>/ladder/{chunk}/forces.parquet",
        files=directory("<results>/ladder/{chunk}/files"),
    log:
        "<logs>/ladder/{chunk}.log",
    benchmark:
        "<benchmarks>/ladder/{chunk}.tsv"
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    threads: ask.threads("ladder")
    resources:
        mem_mb=ask.mem_mb("ladder"),
        runtime=ask.runtime("ladder"),
        gpu=ask.gpus("ladder"),
    params:
        relax=campaign.section("relax"),
        displacements=lambda wildcards: campaign.displacements(wildcards.chunk),
        force_constants=campaign.section("force_constants"),
        stability=campaign.section("stability"),
        ladder=campaign.section("ladder"),
        structures=config["structures"],
        engine=lambda wildcards: campaign.ladder_engine(wildcards.chunk),
    script:
        "../../scripts/ladder.py"
