rule export:
    input:
        expand("<results>/exports/{format}", format=config["exports"]["formats"]),


rule export_format:
    input:
        materials="<results>/dataset/materials.parquet",
        kappa="<results>/dataset/kappa.parquet",
        forces="<results>/dataset/forces.parquet",
        files=expand("<solved>/{chunk}/files", chunk=campaign.chunks),
    output:
        folder=directory("<results>/exports/{format}"),
    log:
        "<logs>/exports/{format}.log",
    wildcard_constraints:
        format="extxyz|phonopy|ase|n2p2|optimade",
    localrule: True
    conda:
        "../../envs/phonon.yaml"
    envmodules:
        *config["site"]["modules"]["phonon"],
    params:
        chunks=campaign.chunks,
        seed=config["benchmark"]["seeds"][0],
        valid_fraction=config["exports"]["valid_fraction"],
        test_fraction=config["exports"]["test_fraction"],
    script:
        "../../scripts/export.py"
