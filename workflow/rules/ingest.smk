rule ingest:
    log:
        "<logs>/ingest.log",
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    threads: 64
    params:
        sources=config["ingest"]["sources"],
        folder=campaign.ingest,
        chunk_size=config["chunk_size"],
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/ingest.py"
