rule srme_chunk:
    input:
        crystals="<relaxed>/{chunk}/crystals.parquet",
        files="<solved>/{chunk}/files",
        status="<results>/conductivity/{chunk}/status.parquet",
        reference=config["srme"]["reference"] or [],
    output:
        table="<results>/srme/chunks/{chunk}.parquet",
    log:
        "<logs>/srme/{chunk}.log",
    benchmark:
        "<benchmarks>/srme/{chunk}.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    # As the conductivity, which is only computed where the ledger has lost it.
    threads: ask.threads("conductivity")
    resources:
        mem_mb=ask.mem_mb("conductivity"),
        runtime=ask.runtime("conductivity"),
    params:
        conductivity=campaign.section("conductivity"),
        temperature=config["srme"]["temperature"],
        ids=lambda wildcards: campaign.srme_materials_of(wildcards.chunk),
        engine=lambda wildcards: campaign.engine_name(wildcards.chunk),
    script:
        "../../scripts/srme_chunk.py"


rule srme:
    input:
        tables=lambda wildcards: expand("<results>/srme/chunks/{chunk}.parquet", chunk=campaign.srme_chunks()),
        reference=config["srme"]["reference"] or [],
    output:
        table=report("<results>/srme/srme.csv", category="kappa-103 benchmark", caption="../report/srme.rst"),
        summary=report("<results>/srme/summary.csv", category="kappa-103 benchmark", caption="../report/srme.rst"),
        figures=report(
            directory("<results>/srme/figures"),
            patterns=["{figure}.svg"],
            category="kappa-103 benchmark",
            labels={"figure": "{figure}"},
            caption="../report/srme.rst",
        ),
    log:
        "<logs>/srme.log",
    benchmark:
        "<benchmarks>/srme.tsv"
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    script:
        "../../scripts/srme.py"
