"""Predict crystals with a saved surrogate."""

from kappaflow import job
from kappaflow.surrogates import prediction

job.start(snakemake)
prediction.predict_files(
    snakemake.params.structures,
    snakemake.config["predict"]["model"],
    snakemake.params.symprec,
    snakemake.output.predictions,
)
