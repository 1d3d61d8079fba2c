rule outside_table:
    input:
        table=lambda wildcards: config["ingest"]["tables"][wildcards.source]["table"],
        structures=lambda wildcards: config["ingest"]["tables"][wildcards.source]["structures"] or [],
    output:
        materials="<results>/ingest/tables/{source}/materials.parquet",
        kappa="<results>/ingest/tables/{source}/kappa.parquet",
    log:
        "<logs>/ingest/tables/{source}.log",
    benchmark:
        "<benchmarks>/ingest/tables/{source}.tsv"
    wildcard_constraints:
        source="|".join(config["ingest"]["tables"]) or "(?!)",
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        settings=lambda wildcards: {
            key: config["ingest"]["tables"][wildcards.source][key]
            for key in ("columns", "method", "temperature", "isotopes", "nac", "sha256")
        },
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/outside_table.py"
