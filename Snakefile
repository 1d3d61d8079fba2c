"""kappaflow: crystals -> conductivities -> dataset -> splits -> surrogates. See README.md."""


include: "workflow/Snakefile"


rule all:
    input:
        rules.everything.input,
