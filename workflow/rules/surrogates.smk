rule surrogates:
    input:
        labels="<results>/labels/{source}/labels.parquet",
        split="<results>/splits/{source}/{split}/{seed}/split.parquet",
        leakage="<results>/splits/{source}/{split}/{seed}/leakage.parquet",
        features=lambda wildcards: expand(
            "<results>/features/{source}/{features}.parquet",
            source=wildcards.source,
            features=campaign.features_of(wildcards.model),
        ),
    output:
        predictions="<results>/surrogates/{source}/{split}/{model}/{seed}/predictions.parquet",
        fit="<results>/surrogates/{source}/{split}/{model}/{seed}/fit.parquet",
        model=directory("<results>/surrogates/{source}/{split}/{model}/{seed}/model"),
    log:
        "<logs>/surrogates/{source}/{split}/{model}/{seed}.log",
    benchmark:
        "<benchmarks>/surrogates/{source}/{split}/{model}/{seed}.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
        gpu=lambda wildcards: ask.gpus_of_model(wildcards.model),
    params:
        model=lambda wildcards: campaign.known_models[wildcards.model],
        split=lambda wildcards: config["splits"][wildcards.split.partition("@")[0]],
        features=lambda wildcards: {
            name: campaign.feature_settings(name) for name in campaign.features_of(wildcards.model)
        },
    script:
        "../../scripts/surrogates.py"


rule predictions:
    input:
        predictions=[
            f"<results>/surrogates/{{source}}/{split}/{model}/{seed}/predictions.parquet"
            for split, model, seed in campaign.fits
        ],
        fits=[
            f"<results>/surrogates/{{source}}/{split}/{model}/{seed}/fit.parquet"
            for split, model, seed in campaign.fits
        ],
    output:
        predictions="<results>/surrogates/{source}/predictions.parquet",
        fits="<results>/surrogates/{source}/fits.parquet",
    log:
        "<logs>/surrogates/{source}/predictions.log",
    benchmark:
        "<benchmarks>/surrogates/{source}/predictions.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    script:
        "../../scripts/predictions.py"


rule leaderboard:
    input:
        predictions="<results>/surrogates/{source}/predictions.parquet",
        fits="<results>/surrogates/{source}/fits.parquet",
    output:
        table=report(
            "<results>/surrogates/{source}/leaderboard.csv",
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "leaderboard (table)"},
            caption="../report/leaderboard.rst",
        ),
        verdicts="<results>/surrogates/{source}/leaderboard.txt",
        page="<results>/surrogates/{source}/leaderboard.html",
        figures=report(
            directory("<results>/surrogates/{source}/figures"),
            patterns=["{figure}.svg"],
            category="Surrogates",
            subcategory="{source}",
            labels={"figure": "{figure}"},
            caption="../report/leaderboard.rst",
        ),
    log:
        "<logs>/surrogates/{source}/leaderboard.log",
    benchmark:
        "<benchmarks>/surrogates/{source}/leaderboard.tsv"
    conda:
        "../../envs/surrogates.yaml"
    envmodules:
        *config["site"]["modules"]["surrogates"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
    script:
        "../../scripts/leaderboard.py"


rule predict:
    input:
        model=config["predict"]["model"] or [],
    output:
        predictions="<results>/predict/predictions.csv",
    log:
        "<logs>/predict.log",
    benchmark:
        "<benchmarks>/predict.tsv"
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        structures=config["predict"]["structures"],
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/predict.py"
