rule status:
    log:
        "<logs>/status.log",
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        jobs=campaign.jobs,
        folder=f"{config['results']}/status",
    script:
        "../../scripts/status.py"


rule jobs:
    input:
        structures=campaign.structures(),
    log:
        "<logs>/jobs.log",
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        chunks={chunk: members for chunk, members in campaign.computed_chunks.items() if campaign.is_dft(chunk)},
        engines={chunk: campaign.engine(chunk) for chunk in campaign.computed_chunks if campaign.is_dft(chunk)},
        protocol=campaign.provenance["protocol"],
        structures=config["structures"],
        jobs=campaign.jobs,
    script:
        "../../scripts/jobs.py"


rule collect:
    log:
        "<logs>/collect.log",
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        jobs=campaign.jobs,
    script:
        "../../scripts/collect.py"
