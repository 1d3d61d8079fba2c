"""What every column of every table means: the one source of names, types, units and shapes.

Structure columns carry their OPTIMADE names. Tensors are full 3x3, arrays of vectors are (n, 3).
"""

from __future__ import annotations

import pyarrow as pa

from kappaflow.dataset.tables import Column, TableSchema

TEXT, INT, REAL, FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
VECTOR = pa.list_(pa.float64(), 3)
TENSOR = pa.list_(VECTOR, 3)
VECTORS = pa.list_(VECTOR)
REALS, TEXTS = pa.list_(pa.float64()), pa.list_(pa.string())
INT_MATRIX = pa.list_(pa.list_(pa.int64(), 3), 3)

MATERIAL_ID = Column("material_id", TEXT, "name of the material in this campaign")
STATUS = Column(
    "status", TEXT, "ok, refused (input cannot be computed), duplicate, failed or unstable (imaginary modes)"
)
REASON = Column("reason", TEXT, "why the status is not ok; empty otherwise")
STRUCTURE_HASH = Column("structure_hash", TEXT, "sha256 of the standardised input crystal")

CRYSTAL = [
    Column("chemical_formula_reduced", TEXT, "reduced formula, elements in alphabetical order (OPTIMADE)"),
    Column("nsites", INT, "atoms in the stored (conventional) cell (OPTIMADE)"),
    Column("lattice_vectors", TENSOR, "rows are the cell vectors (OPTIMADE)", "angstrom", "(3, 3)"),
    Column(
        "cartesian_site_positions", VECTORS, "positions of the atoms (OPTIMADE)", "angstrom", "(nsites, 3)"
    ),
    Column("species_at_sites", TEXTS, "element of each atom (OPTIMADE)", "", "(nsites,)"),
    Column("space_group_number", INT, "international number of the space group, by spglib"),
    Column("space_group_symbol", TEXT, "Hermann-Mauguin symbol"),
    Column(
        "crystal_system", TEXT, "cubic, hexagonal, trigonal, tetragonal, orthorhombic, monoclinic, triclinic"
    ),
    Column("nsites_primitive", INT, "atoms in the primitive cell"),
]

STRUCTURES = TableSchema(
    "structures",
    "One row per entry of the material list: the standardised crystal, or why it was not accepted.",
    [
        MATERIAL_ID,
        Column("source", TEXT, "file (and frame or row) that the crystal was read from"),
        STATUS,
        REASON,
        Column("duplicate_of", TEXT, "material_id of the earlier entry that is the same crystal"),
        STRUCTURE_HASH,
        *CRYSTAL,
    ],
)

LABELS = TableSchema(
    "labels",
    "One row per labelled calculation: a crystal and its conductivity; what splits and surrogates learn from.",
    [
        MATERIAL_ID,
        Column(
            "kappa",
            REAL,
            "conductivity at `temperature`, a third of the trace of the total tensor",
            "W/(m K)",
        ),
        Column("temperature", REAL, "temperature of the label", "K"),
        *CRYSTAL,
    ],
)

SPLIT = TableSchema(
    "split",
    "One row per material: on which side of the split all of its rows stand.",
    [
        MATERIAL_ID,
        Column("subset", TEXT, "train or test"),
    ],
)

PREDICTIONS = TableSchema(
    "predictions",
    "One row per labelled calculation: what a surrogate fitted on train says of it.",
    [
        MATERIAL_ID,
        Column("split", TEXT, "name of the split"),
        Column("model", TEXT, "name of the surrogate"),
        Column("subset", TEXT, "train or test"),
        Column("kappa", REAL, "label", "W/(m K)"),
        Column("kappa_predicted", REAL, "prediction", "W/(m K)"),
    ],
)
