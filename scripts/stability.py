"""Look for imaginary modes of the materials of a chunk."""

from kappaflow import job
from kappaflow.dataset import schemas, tables
from kappaflow.phonons import stability
from kappaflow.protocol import Stability

job.start(snakemake)
verdicts = stability.judge_chunk(
    tables.read(snakemake.input.status), snakemake.input.files, Stability(**snakemake.params.stability)
)
tables.write(snakemake.output.status, verdicts, schemas.STABILITY)
