from kappaflow.campaign import COMPUTED, INGESTED


def labelled(source: str) -> dict:
    """Which conductivities are labels: arguments of kappaflow.labels.from_tables."""
    settings = config["labels"]
    if source == COMPUTED:
        return {
            "origins": [COMPUTED, *config["ingest"]["sources"]],
            "engine": campaign.label_engine,
            "method": settings["method"],
            "temperature": settings["temperature"],
        }
    bounds = {key: config["ingest"]["tables"][source].get(key) for key in ("min_kappa", "max_kappa")}
    return {"origins": [source], "engine": INGESTED, "temperature": settings["temperature"], **bounds}


def with_conductivities(source: str) -> str:
    """Folder of the tables that hold them."""
    return f"{config['results']}/dataset" if source == COMPUTED else f"{config['results']}/ingest/tables/{source}"


rule labels:
    input:
        materials=lambda wildcards: f"{with_conductivities(wildcards.source)}/materials.parquet",
        kappa=lambda wildcards: f"{with_conductivities(wildcards.source)}/kappa.parquet",
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
        selection=lambda wildcards: labelled(wildcards.source),
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
