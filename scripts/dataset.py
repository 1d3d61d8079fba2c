"""Join the tables of all chunks into the published dataset."""

from itertools import chain

from kappaflow import engines, job
from kappaflow.dataset import assembly, schemas, tables

job.start(snakemake)
engine = engines.create(snakemake.params.engine)
protocol = snakemake.params.provenance
stage_rows = {stage: list(chain.from_iterable(map(tables.read, snakemake.input[stage]))) for stage in assembly.STAGES}
materials = assembly.join_materials(
    tables.read(snakemake.input.structures),
    stage_rows,
    {"protocol_hash": protocol["protocol_hash"], "engine_hash": engine.hash},
)
kappa = assembly.sorted_kappa(chain.from_iterable(map(tables.read, snakemake.input.kappa)))
folders = {
    material: folder
    for members, folder in zip(snakemake.params.chunks.values(), snakemake.input.files, strict=True)
    for material in members
}
output = snakemake.output
tables.write(output.materials, materials, schemas.MATERIALS)
tables.write(output.kappa, kappa, schemas.KAPPA)
force_tables = chain(*zip(snakemake.input.relax_forces, snakemake.input.supercell_forces, strict=True))
tables.write_batches(output.forces, assembly.force_batches(list(force_tables)), schemas.FORCES)
assembly.collect_params(materials, folders, output.params)
assembly.write_readme(output.readme, materials, len(kappa))
assembly.write_manifest(
    output.manifest,
    [output.materials, output.kappa, output.forces],
    protocol["protocol"],
    protocol["protocol_hash"],
    engine.identity,
    engine.hash,
)
