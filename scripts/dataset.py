"""Join the tables of all chunks into the published dataset."""

import json
from pathlib import Path

from kappaflow import engines, job
from kappaflow.dataset import assembly, publication, schemas, tables

job.start(snakemake)
inputs, output, params = snakemake.input, snakemake.output, snakemake.params
used = {name: engines.create(engine) for name, engine in params.engines.items()}
ingested = json.loads(Path(inputs.ingested[0]).read_text()) if inputs.ingested else {}
files = tables.read_all(inputs.ingested_files)

structures = tables.read_all(inputs.structures)
own_materials = assembly.join_materials(
    structures,
    {stage: assembly.read_stage(inputs[stage]) for stage in assembly.STAGES},
    params.provenance["protocol_hash"],
    assembly.provenance(
        structures,
        {name: {"engine_hash": engine.hash, **engine.identity} for name, engine in used.items()},
        ingested,
    ),
)
own_kappa = assembly.join_kappa(tables.read_all(inputs.kappa), own_materials)
materials = assembly.merge(own_materials, tables.read_all(inputs.outside_materials))
kappa = assembly.merge(own_kappa, tables.read_all(inputs.outside_kappa))

tables.write(output.materials, materials, schemas.MATERIALS)
tables.write(output.kappa, kappa, schemas.KAPPA)
tables.write_batches(output.spectra, assembly.spectra_batches(inputs.spectra), schemas.SPECTRA)
tables.write(output.failures, assembly.join_failures(materials, files), schemas.FAILURES)
force_tables = [*inputs.relax_forces, *inputs.supercell_forces, *inputs.ladder_forces, *inputs.loose_forces]
tables.write_batches(output.forces, assembly.force_batches(force_tables, own_materials), schemas.FORCES)

chunk_of = {name: number for number, members in enumerate(params.chunks.values()) for name in members}
assembly.collect_params(materials, {name: inputs.files[number] for name, number in chunk_of.items()}, output.params)
if params.dataset["modes"]:
    assembly.collect_modes({name: inputs.modes[number] for name, number in chunk_of.items()}, output.modes)
publication.publish(
    Path(output.readme).parent, params.dataset, params.provenance, materials, kappa, files, ingested.get("engines", {})
)
