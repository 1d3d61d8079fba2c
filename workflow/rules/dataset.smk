rule dataset:
    input:
        structures=lambda wildcards: campaign.all_structures(),
        relax=expand("<results>/relax/{chunk}/crystals.parquet", chunk=campaign.chunks),
        relax_forces=expand("<results>/relax/{chunk}/forces.parquet", chunk=campaign.chunks),
        displacements=expand("<results>/displacements/{chunk}.parquet", chunk=campaign.chunks),
        forces=expand("<results>/forces/{chunk}/status.parquet", chunk=campaign.chunks),
        supercell_forces=expand("<results>/forces/{chunk}/forces.parquet", chunk=campaign.chunks),
        force_constants=expand("<results>/force_constants/{chunk}/status.parquet", chunk=campaign.chunks),
        files=expand("<solved>/{chunk}/files", chunk=campaign.chunks),
        ladder=expand("<results>/ladder/{chunk}/status.parquet", chunk=campaign.ladder_chunks),
        ladder_forces=expand("<results>/ladder/{chunk}/forces.parquet", chunk=campaign.ladder_chunks),
        stability=expand("<results>/stability/{chunk}.parquet", chunk=campaign.chunks),
        conductivity=expand("<results>/conductivity/{chunk}/status.parquet", chunk=campaign.chunks),
        kappa=expand("<results>/conductivity/{chunk}/kappa.parquet", chunk=campaign.chunks),
        spectra=expand("<results>/stability/{chunk}.spectra.parquet", chunk=campaign.chunks)
        + expand("<results>/conductivity/{chunk}/spectra.parquet", chunk=campaign.chunks),
        modes=expand(
            "<results>/conductivity/{chunk}/modes", chunk=campaign.chunks if config["dataset"]["modes"] else []
        ),
        ingested=["<results>/ingest/engines.json"] if config["ingest"]["sources"] else [],
        ingested_files=["<results>/ingest/files.parquet"] if config["ingest"]["sources"] else [],
        loose_forces=["<results>/ingest/loose.parquet"] if config["ingest"]["sources"] else [],
        outside_materials=expand(
            "<results>/ingest/tables/{source}/materials.parquet", source=config["ingest"]["tables"]
        ),
        outside_kappa=expand("<results>/ingest/tables/{source}/kappa.parquet", source=config["ingest"]["tables"]),
    output:
        **({"modes": directory("<results>/dataset/modes")} if config["dataset"]["modes"] else {}),
        materials="<results>/dataset/materials.parquet",
        kappa="<results>/dataset/kappa.parquet",
        forces="<results>/dataset/forces.parquet",
        spectra="<results>/dataset/spectra.parquet",
        failures="<results>/dataset/failures.parquet",
        manifest="<results>/dataset/manifest.json",
        schema="<results>/dataset/schema.json",
        croissant="<results>/dataset/croissant.json",
        readme="<results>/dataset/README.md",
        params=directory("<results>/dataset/phono3py_params"),
    log:
        "<logs>/dataset.log",
    benchmark:
        "<benchmarks>/dataset.tsv"
    conda:
        "../../envs/mlip.yaml"
    envmodules:
        *config["site"]["modules"]["mlip"],
    resources:
        mem_mb=ask.mem_mb_of_all,
        runtime=ask.runtime_of_all,
    params:
        chunks=campaign.chunks,
        provenance=campaign.provenance,
        engines=campaign.engines,
        dataset=config["dataset"],
    script:
        "../../scripts/dataset.py"


rule failures:
    input:
        materials="<results>/dataset/materials.parquet",
    output:
        failures=report(
            "<results>/failures.csv",
            category="Dataset",
            labels={"table": "materials without a conductivity"},
            caption="../report/failures.rst",
        ),
    log:
        "<logs>/failures.log",
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        max_failed_fraction=config["max_failed_fraction"],
        outside=list(config["ingest"]["tables"]),
    script:
        "../../scripts/failures.py"
