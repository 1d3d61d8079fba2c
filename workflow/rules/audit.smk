rule measure:
    input:
        lambda wildcards: campaign.audit_files,
    output:
        measured="<results>/audit/{engine}/measured.parquet",
        curves="<results>/audit/{engine}/curves.parquet",
    log:
        "<logs>/audit/{engine}.log",
    benchmark:
        "<benchmarks>/audit/{engine}.tsv"
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=lambda wildcards: ask.gpus_of_audit(wildcards.engine),
    params:
        engine=lambda wildcards: campaign.audited[wildcards.engine],
        settings={key: value for key, value in config["audit"].items() if key != "limits"},
        distance=campaign.section("displacements")["distance"],
        symprec=config["structures"]["symprec"],
    script:
        "../../scripts/measure.py"


# Its tables and figures are no outputs: Snakemake would delete them where a check fails.
rule audit:
    input:
        measured=expand("<results>/audit/{engine}/measured.parquet", engine=campaign.audited),
        curves=expand("<results>/audit/{engine}/curves.parquet", engine=campaign.audited),
    log:
        "<logs>/audit.log",
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    params:
        engines=campaign.audited,
        limits=config["audit"]["limits"],
        distance=campaign.section("displacements")["distance"],
        folder=lambda wildcards: f"{config['results']}/audit",
    script:
        "../../scripts/audit.py"
