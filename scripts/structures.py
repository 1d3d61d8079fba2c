"""Read, check and standardise the entries of one extension of the material list; keep which chunk each belongs to."""

from kappaflow import chunks, engines, job, structures
from kappaflow.campaign import Campaign
from kappaflow.dataset import schemas, tables
from kappaflow.progress import Progress, logger

job.start(snakemake)
campaign = Campaign.load(snakemake.config)
entries = campaign.entries_of(int(snakemake.wildcards.extension))
progress = Progress("structures", len(entries), "entries")
used = {name: engines.create(engine) for name, engine in snakemake.params.engines.items()}
rows = structures.build_table(
    entries,
    snakemake.params.settings["symprec"],
    {name: engine.elements() for name, engine in used.items()},
    lambda done, total: progress.step(),
    tables.read_all(snakemake.input.before),
)
for row in rows:
    if row["status"] == "ok":
        used[row["engine"]].require(row["species_at_sites"])
chunks.write_manifest(campaign.manifest, campaign.places)
tables.write(snakemake.output.structures, rows, schemas.STRUCTURES)
for row in rows:
    if row["status"] != "ok":
        logger.info("%s %s: %s", row["status"], row["material_id"], row["reason"])
logger.info("%d of %d entries accepted", sum(row["status"] == "ok" for row in rows), len(rows))
