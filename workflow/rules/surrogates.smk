rule surrogates:
    input:
        labels="<results>/labels/{source}/labels.parquet",
        split="<results>/splits/{source}/{split}.parquet",
    output:
        predictions="<results>/surrogates/{source}/{split}/{model}.parquet",
    log:
        "<logs>/surrogates/{source}/{split}/{model}.log",
    benchmark:
        "<benchmarks>/surrogates/{source}/{split}/{model}.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
        gpu=lambda wildcards: ask.gpus_of_model(wildcards.model),
    params:
        model=lambda wildcards: config["surrogates"]["models"][wildcards.model],
        split=lambda wildcards: config["splits"][wildcards.split],
        seed=config["surrogates"]["seed"],
    script:
        "../../scripts/surrogates.py"


rule leaderboard:
    input:
        predictions=expand(
            "<results>/surrogates/{{source}}/{split}/{model}.parquet",
            split=config["splits"],
            model=config["surrogates"]["models"],
        ),
    output:
        table=report(
            "<results>/surrogates/{source}/leaderboard.csv",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "leaderboard (table)"},
            caption="../report/leaderboard.rst",
        ),
        bars=report(
            "<results>/surrogates/{source}/leaderboard.svg",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "leaderboard"},
            caption="../report/leaderboard.rst",
        ),
        parity=report(
            "<results>/surrogates/{source}/parity.svg",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "parity"},
            caption="../report/parity.rst",
        ),
    log:
        "<logs>/surrogates/{source}/leaderboard.log",
    benchmark:
        "<benchmarks>/surrogates/{source}/leaderboard.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    script:
        "../../scripts/leaderboard.py"
