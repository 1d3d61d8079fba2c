rule labels_computed:
    input:
        materials="<results>/dataset/materials.parquet",
        kappa="<results>/dataset/kappa.parquet",
    output:
        labels="<results>/labels/computed/labels.parquet",
        skipped="<results>/labels/computed/skipped.parquet",
    log:
        "<logs>/labels/computed.log",
    benchmark:
        "<benchmarks>/labels/computed.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    params:
        engine=campaign.label_engine,
        method=config["labels"]["method"],
        temperature=config["labels"]["temperature"],
    script:
        "../../scripts/labels_computed.py"


rule labels_table:
    input:
        table=lambda wildcards: config["labels"]["tables"][wildcards.source]["table"],
        structures=lambda wildcards: config["labels"]["tables"][wildcards.source]["structures"],
    output:
        labels="<results>/labels/{source}/labels.parquet",
        skipped="<results>/labels/{source}/skipped.parquet",
    log:
        "<logs>/labels/{source}.log",
    benchmark:
        "<benchmarks>/labels/{source}.tsv"
    wildcard_constraints:
        source="|".join(config["labels"]["tables"]) or "(?!)",
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    params:
        columns=lambda wildcards: config["labels"]["tables"][wildcards.source],
        temperature=config["labels"]["temperature"],
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/labels_table.py"


rule splits:
    input:
        labels="<results>/labels/{source}/labels.parquet",
    output:
        split="<results>/splits/{source}/{split}.parquet",
    log:
        "<logs>/splits/{source}/{split}.log",
    benchmark:
        "<benchmarks>/splits/{source}/{split}.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    params:
        options=lambda wildcards: config["splits"][wildcards.split],
        seed=config["surrogates"]["seed"],
    script:
        "../../scripts/splits.py"
