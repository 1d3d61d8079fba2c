"""The prototype of every labelled material, by matching structures."""

from kappaflow import job, splits
from kappaflow.dataset import schemas, tables

job.start(snakemake)
found = splits.label_prototypes(tables.read(snakemake.input.labels))
rows = [{"material_id": name, "prototype": prototype} for name, prototype in sorted(found.items())]
tables.write(snakemake.output.prototypes, rows, schemas.PROTOTYPES)
