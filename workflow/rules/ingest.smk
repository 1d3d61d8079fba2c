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
        results=config["results"],
        record=f"{campaign.ingest}/sources.json",
        chunk_size=config["chunk_size"],
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/ingest.py"
