"""Join the rows of the kappa-103 benchmark, average and draw them."""

from kappaflow import job, plots_srme
from kappaflow.dataset import tables
from kappaflow.srme import comparison, reference

job.start(snakemake)
rows = tables.read_all(snakemake.input.tables)
comparison.write(rows, len(reference.read(snakemake.input.reference)), snakemake.output.table, snakemake.output.summary)
plots_srme.figures(rows, snakemake.output.figures)
