rule phonon_features:
    input:
        relax="<relaxed>/{chunk}/crystals.parquet",
        files="<solved>/{chunk}/files",
        stability="<results>/stability/{chunk}.parquet",
        status="<results>/conductivity/{chunk}/status.parquet",
        kappa="<results>/conductivity/{chunk}/kappa.parquet",
        modes="<results>/conductivity/{chunk}/modes" if config["dataset"]["modes"] else [],
    output:
        features="<results>/phonon_features/{chunk}.parquet",
    log:
        "<logs>/phonon_features/{chunk}.log",
    benchmark:
        "<benchmarks>/phonon_features/{chunk}.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    resources:
        mem_mb=ask.mem_mb("phonon_features"),
        runtime=ask.runtime("phonon_features"),
    params:
        temperature=config["labels"]["temperature"],
    script:
        "../../scripts/phonon_features.py"


rule features:
    input:
        labels="<results>/labels/{source}/labels.parquet",
        phonons=lambda wildcards: (
            expand("<results>/phonon_features/{chunk}.parquet", chunk=campaign.phonon_chunks(wildcards.source))
            if wildcards.features == "phonons"
            else []
        ),
    output:
        features="<results>/features/{source}/{features}.parquet",
    log:
        "<logs>/features/{source}/{features}.log",
    benchmark:
        "<benchmarks>/features/{source}/{features}.tsv"
    wildcard_constraints:
        source="|".join(campaign.label_sources) or "(?!)",
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
        gpu=lambda wildcards: ask.gpus_of_features(wildcards.features),
    params:
        settings=lambda wildcards: campaign.feature_settings(wildcards.features),
    script:
        "../../scripts/features.py"
