rule displace:
    input:
        structures=lambda wildcards: campaign.structures(wildcards.chunk),
        crystals="<results>/relax/{chunk}/crystals.parquet",
    output:
        displacements="<results>/displacements/{chunk}.parquet",
    log:
        "<logs>/displace/{chunk}.log",
    benchmark:
        "<benchmarks>/displace/{chunk}.tsv"
    wildcard_constraints:
        chunk=chunks.COMPUTED,
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        displacements=lambda wildcards: campaign.displacements(wildcards.chunk),
    script:
        "../../scripts/displace.py"
