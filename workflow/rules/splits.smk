rule labels:
    input:
        materials=lambda wildcards: f"{campaign.with_conductivities(wildcards.source)}/materials.parquet",
        kappa=lambda wildcards: f"{campaign.with_conductivities(wildcards.source)}/kappa.parquet",
    output:
        labels="<results>/labels/{source}/labels.parquet",
        skipped="<results>/labels/{source}/skipped.parquet",
    log:
        "<logs>/labels/{source}.log",
    benchmark:
        "<benchmarks>/labels/{source}.tsv"
    wildcard_constraints:
        source="|".join(campaign.label_sources) or "(?!)",
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    params:
        selection=lambda wildcards: campaign.labelled(wildcards.source),
    script:
        "../../scripts/labels.py"


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
