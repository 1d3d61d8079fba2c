"""Write the dataset in the format of another program."""

from datetime import UTC, datetime
from pathlib import Path

from kappaflow import job
from kappaflow.dataset import exports, tables

job.start(snakemake)
inputs, params = snakemake.input, snakemake.params
materials = tables.read(inputs.materials)
kappa = tables.read(inputs.kappa)
folder = Path(snakemake.output.folder)
match snakemake.wildcards.format:
    case "extxyz" | "n2p2" as name:
        evaluated = exports.with_frames(materials, inputs.forces)
        split = exports.Split(evaluated, params.seed, params.valid_fraction, params.test_fraction)
        if name == "extxyz":
            exports.write_extxyz(folder, inputs.forces, materials, split)
        else:
            exports.write_n2p2(folder, inputs.forces, split)
    case "phonopy":
        files = zip(params.chunks.values(), inputs.files, strict=True)
        exports.write_phonopy(folder, {name: Path(place, name) for members, place in files for name in members})
    case "ase":
        exports.write_ase(folder / "ase.db", materials, kappa)
    case "optimade":
        written = datetime.fromtimestamp(int(Path(inputs.materials).stat().st_mtime), UTC)
        exports.write_optimade(folder / "structures.jsonl", materials, kappa, written.strftime("%Y-%m-%dT%H:%M:%SZ"))
