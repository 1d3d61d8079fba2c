"""Read, check and standardise every entry of the material list; keep which chunk each belongs to."""

from kappaflow import chunks, engines, job, structures
from kappaflow.campaign import Campaign
from kappaflow.dataset import schemas, tables
from kappaflow.progress import Progress, logger

job.start(snakemake)
campaign = Campaign.load(snakemake.config)
progress = Progress("structures", len(campaign.entries), "entries")
rows = structures.build_table(
    campaign.entries,
    snakemake.params.settings["symprec"],
    engines.create(snakemake.params.engine).elements(),
    lambda done, total: progress.step(),
)
tables.write(snakemake.output.structures, rows, schemas.STRUCTURES)
chunks.write_manifest(campaign.manifest, campaign.assignment)
for row in rows:
    if row["status"] != "ok":
        logger.info("%s %s: %s", row["status"], row["material_id"], row["reason"])
logger.info("%d of %d entries accepted", sum(row["status"] == "ok" for row in rows), len(rows))
