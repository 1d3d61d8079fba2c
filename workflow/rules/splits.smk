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


rule prototypes:
    input:
        labels="<results>/labels/{source}/labels.parquet",
    output:
        prototypes="<results>/labels/{source}/prototypes.parquet",
    log:
        "<logs>/prototypes/{source}.log",
    benchmark:
        "<benchmarks>/prototypes/{source}.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
    script:
        "../../scripts/prototypes.py"


rule splits:
    input:
        labels="<results>/labels/{source}/labels.parquet",
        prototypes="<results>/labels/{source}/prototypes.parquet",
        features=expand("<results>/features/{{source}}/{features}.parquet", features=["composition", "structure"]),
    output:
        split="<results>/splits/{source}/{split}/{seed}/split.parquet",
        leakage="<results>/splits/{source}/{split}/{seed}/leakage.parquet",
    log:
        "<logs>/splits/{source}/{split}/{seed}.log",
    benchmark:
        "<benchmarks>/splits/{source}/{split}/{seed}.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    params:
        options=lambda wildcards: config["splits"][wildcards.split.partition("@")[0]],
    script:
        "../../scripts/splits.py"


rule leakage:
    input:
        leakage=[
            f"<results>/splits/{{source}}/{split}/{seed}/leakage.parquet"
            for split, seed in campaign.all_splits
            if "@" not in split
        ],
    output:
        table=report(
            "<results>/splits/{source}/leakage.csv",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "leakage of the splits (table)"},
            caption="../report/leakage.rst",
        ),
        figure=report(
            "<results>/splits/{source}/leakage.svg",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "leakage of the splits"},
            caption="../report/leakage.rst",
        ),
    log:
        "<logs>/splits/{source}/leakage.log",
    benchmark:
        "<benchmarks>/splits/{source}/leakage.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    script:
        "../../scripts/leakage.py"
