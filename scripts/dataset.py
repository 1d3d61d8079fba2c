"""Join the tables of all chunks into the published dataset."""

from kappaflow import engines, job
from kappaflow.dataset import assembly, schemas, tables

job.start(snakemake)
used = {name: engines.create(engine) for name, engine in snakemake.params.engines.items()}
protocol = snakemake.params.provenance
stage_rows = {stage: assembly.read_stage(snakemake.input[stage]) for stage in assembly.STAGES}
materials = assembly.join_materials(
    tables.read_all(snakemake.input.structures),
    stage_rows,
    protocol["protocol_hash"],
    {name: engine.hash for name, engine in used.items()},
)
kappa = assembly.join_kappa(tables.read_all(snakemake.input.kappa), materials)
inputs = snakemake.input
folders, force_tables = {}, {}
for members, *paths in zip(
    snakemake.params.chunks.values(), inputs.files, inputs.relax_forces, inputs.supercell_forces, strict=True
):
    folders.update(dict.fromkeys(members, paths[0]))
    force_tables.update(dict.fromkeys(members, paths[1:]))
output = snakemake.output
tables.write(output.materials, materials, schemas.MATERIALS)
tables.write(output.kappa, kappa, schemas.KAPPA)
tables.write_batches(output.forces, assembly.force_batches(force_tables), schemas.FORCES)
assembly.collect_params(materials, folders, output.params)
assembly.write_readme(output.readme, materials, len(kappa))
assembly.write_manifest(
    output.manifest,
    [output.materials, output.kappa, output.forces],
    protocol["protocol"],
    protocol["protocol_hash"],
    used,
)
