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
REALS, TEXTS, ATOMS = pa.list_(pa.float64()), pa.list_(pa.string()), pa.list_(pa.int64())
INTS = pa.list_(pa.int64(), 3)

MATERIAL_ID = Column("material_id", TEXT, "name of the material in this campaign")
ORIGIN = Column("origin", TEXT, "computed (by this campaign), or the name of the ingested source or table")
STATUS = Column(
    "status",
    TEXT,
    "ok, refused (input cannot be used), duplicate, failed, unstable (imaginary modes) or harmonic (stable, but no "
    "third-order forces, hence no conductivity)",
)
REASON = Column("reason", TEXT, "why the status is not ok; empty otherwise")
SOURCE = Column("source", TEXT, "file (and frame or row) that the crystal was read from")
DUPLICATE_OF = Column("duplicate_of", TEXT, "material_id of the earlier entry that is the same crystal")
ENGINE = Column(
    "engine", TEXT, "name of the engine in the config: default, or a key of engines; ingested for outside data"
)
FLAGS = Column("flags", TEXTS, "doubts, which leave the row where it is; empty where there are none", "", "(nflags,)")
ENGINE_HASH = Column(
    "engine_hash", TEXT, "names engine, model, version, weights and arguments, or the settings of ingested runs"
)
STRUCTURE_HASH = Column("structure_hash", TEXT, "sha256 of the standardised input crystal")

CELL = [
    Column("lattice_vectors", TENSOR, "rows are the cell vectors", "angstrom", "(3, 3)", "lattice_vectors"),
    Column(
        "cartesian_site_positions",
        VECTORS,
        "positions of the atoms",
        "angstrom",
        "(nsites, 3)",
        "cartesian_site_positions",
    ),
    Column("species_at_sites", TEXTS, "element of each atom", "", "(nsites,)", "species_at_sites"),
]

YEAR = Column("year", REAL, "year in which the value or its material was first published; null where not known", "yr")

SPACE_GROUP = Column(
    "space_group_number",
    INT,
    "international number of the space group, by spglib",
    optimade="space_group_it_number",
)

CRYSTAL = [
    Column(
        "chemical_formula_reduced",
        TEXT,
        "reduced formula, elements in alphabetical order",
        optimade="chemical_formula_reduced",
    ),
    Column("nsites", INT, "atoms in the stored cell (conventional, or an ingested set's own)", optimade="nsites"),
    *CELL,
    SPACE_GROUP,
    Column("space_group_symbol", TEXT, "Hermann-Mauguin symbol"),
    Column("crystal_system", TEXT, "cubic, hexagonal, trigonal, tetragonal, orthorhombic, monoclinic, triclinic"),
    Column("nsites_primitive", INT, "atoms in the primitive cell"),
]

STRUCTURES = TableSchema(
    "structures",
    "One row per entry of the material list: the standardised crystal, or why it was not accepted.",
    [
        MATERIAL_ID,
        SOURCE,
        ENGINE,
        STATUS,
        REASON,
        DUPLICATE_OF,
        STRUCTURE_HASH,
        *CRYSTAL,
    ],
)

PLAN = TableSchema(
    "plan",
    "One row per accepted material and stage: what will run and what it is expected to cost.",
    [
        MATERIAL_ID,
        Column("stage", TEXT, "stage of the workflow; forces are counted apart for FC2 and FC3"),
        Column("queue", TEXT, "cpu, gpu, or local: where Snakemake runs"),
        Column("tasks", INT, "calculations; for forces, supercells to evaluate (exact)"),
        Column("max_tasks", INT, "the most supercells that random displacements may grow to; null for others"),
        Column("other_tasks", INT, "supercells that the method not taken would need; null where not counted"),
        Column("supercell", TEXT, "multiples of the conventional cell, or the rows of phonopy's matrix for it"),
        Column("atoms", INT, "atoms in each supercell"),
        Column("image_distance", REAL, "shortest distance of an atom to its image in the supercell", "angstrom"),
        Column("q_mesh", TEXT, "mesh of the Brillouin zone, as far as relaxation does not change it"),
        Column(
            "nac",
            TEXT,
            "where the non-analytical term of the conductivity comes from: dfpt, born, none (symmetry allows no Born "
            "charges) or missing; null for ingested forces",
        ),
        Column("core_hours", REAL, "estimated core hours", "h"),
        Column("gpu_hours", REAL, "estimated GPU hours", "h"),
        Column("disk_mb", REAL, "estimated disk space", "MB"),
    ],
)

RELAXATION = [
    Column(
        "relaxation", TEXT, "stage that gave the structure: free, or constrained where free relaxation lost symmetry"
    ),
    Column("relaxation_steps", INT, "optimiser steps of both stages"),
    Column("relaxation_fmax", REAL, "largest force on an atom or the cell at the end", "eV/angstrom"),
    Column("energy", REAL, "energy of the conventional cell after relaxation", "eV"),
    Column("space_group_number_input", INT, "space group before relaxation"),
    Column("volume_ratio", REAL, "volume after relaxation over volume before"),
]

RELAXED = TableSchema(
    "relaxed",
    "One row per material of a chunk: the relaxed crystal.",
    [MATERIAL_ID, STATUS, REASON, STRUCTURE_HASH, *CRYSTAL, *RELAXATION],
)

SUPERCELLS = [
    Column(
        "fc2_supercell",
        INTS,
        "multiples of the stored cell for second-order force constants; null for others",
        "",
        "(3,)",
    ),
    Column(
        "fc2_supercell_matrix",
        TENSOR,
        "the same as phonopy's matrix M for the stored cell, (a b c)_super = (a b c) M; fractions where the supercell "
        "holds no whole number of stored cells, or their parts",
        "",
        "(3, 3)",
    ),
    Column(
        "fc3_supercell",
        INTS,
        "multiples of the stored cell for third-order force constants; null for others",
        "",
        "(3,)",
    ),
    Column("fc3_supercell_matrix", TENSOR, "the same as a matrix, as fc2_supercell_matrix", "", "(3, 3)"),
    Column("fc3_pair_cutoff", REAL, "atoms farther apart were not displaced together; null: all pairs", "angstrom"),
    Column(
        "fc2_supercells",
        INT,
        "supercells evaluated for FC2, the undisplaced one included; 0 where those for FC3 give FC2 too",
    ),
    Column("fc3_supercells", INT, "supercells evaluated for FC3, the undisplaced one included; 0 if FC2 is unstable"),
    Column("fc3_method", TEXT, "displacements for FC3: systematic, or random; null for ingested sets"),
    Column("fc3_max_supercells", INT, "the most that the noise of FC3 may ask for; null if not random"),
    Column("fc3_other_supercells", INT, "supercells that the method not taken would need; null where not counted"),
    Column("fc2_atoms", INT, "atoms in the FC2 supercell"),
    Column("fc3_atoms", INT, "atoms in the FC3 supercell"),
]

DISPLACEMENTS = TableSchema(
    "displacements",
    "One row per material of a chunk: its supercells and displacements.",
    [MATERIAL_ID, STATUS, REASON, *SUPERCELLS, Column("phono3py_disp", TEXT, "phono3py_disp.yaml as text")],
)

FORCES = TableSchema(
    "forces",
    "One row per evaluation of the potential: a cell of the relaxation, or a supercell with displacements.",
    [
        MATERIAL_ID,
        Column(
            "stage",
            TEXT,
            "relax, fc2, fc3, ladder (for any of its rungs), or other (ingested, in no set of displacements)",
        ),
        Column("index", INT, "number of the step or supercell within its stage; supercell 0 is not displaced"),
        Column(
            "task", TEXT, "names the evaluation: hash of crystal and engine, or of the content of what was ingested"
        ),
        Column("energy", REAL, "energy of the cell; null where the source has none", "eV"),
        Column("forces", VECTORS, "forces on the atoms", "eV/angstrom", "(nsites, 3)"),
        Column(
            "stress", TENSOR, "stress, positive for tension; null where the source has none", "eV/angstrom^3", "(3, 3)"
        ),
        *CELL,
        Column("displaced_atoms", ATOMS, "numbers, from 0, of the atoms that are displaced", "", "(ndisplaced,)"),
        Column("displacements", VECTORS, "their displacements", "angstrom", "(ndisplaced, 3)"),
        Column("converged", FLAG, "the electronic structure converged; null where the source does not say"),
        ORIGIN,
        Column("source", TEXT, "file that an ingested evaluation was read from; null if computed here"),
        ENGINE_HASH,
    ],
)

NAC_SOURCE = Column(
    "nac_source",
    TEXT,
    "where Born charges and dielectric tensor come from: dfpt (this campaign), born (a file BORN), ingested (with the "
    "forces), or none",
)

BORN = [
    Column(
        "dielectric_tensor", TENSOR, "high-frequency dielectric tensor; null where it was not computed", "", "(3, 3)"
    ),
    Column(
        "born_charges",
        pa.list_(TENSOR),
        "Born charges of the atoms of phono3py's primitive cell: force along the column in a field along the row",
        "e",
        "(nsites_primitive, 3, 3)",
    ),
    NAC_SOURCE,
]

RANDOM_QUALITY = [
    Column(
        "fc3_held_out",
        REAL,
        "root mean square error of the third-order forces of a pair of supercells that was not fitted, over that of "
        "these forces; null without random displacements",
    ),
    Column("fc3_noise", REAL, "noise of FC3 that follows from it, as a part of FC3; null without random displacements"),
]

STATUS_TABLE = TableSchema(
    "status",
    "One row per material of a chunk: whether its forces are there, and what the non-analytical term needs.",
    [
        MATERIAL_ID,
        STATUS,
        REASON,
        *BORN,
        Column(
            "fc3_supercells",
            INT,
            "supercells with random displacements that were evaluated, the undisplaced one too; 0 where none were, as "
            "FC2 has imaginary modes",
        ),
        *RANDOM_QUALITY,
    ],
)

FORCE_CONSTANT_QUALITY = [
    Column(
        "fc2_residual",
        REAL,
        "root mean square of force + FC2 u over that of the force, FC2 supercells; a constant part of the forces with "
        "the symmetry of the crystal is left out",
    ),
    Column(
        "fc3_residual", REAL, "root mean square of force + FC2 u + FC3 u u / 2 over that of the force, FC3 supercells"
    ),
    *RANDOM_QUALITY,
    Column("fc2_sum_rule", REAL, "largest violation of the acoustic sum rule", "eV/angstrom^2"),
    Column("fc3_sum_rule", REAL, "largest violation of the acoustic sum rule", "eV/angstrom^3"),
]

FORCE_CONSTANTS = TableSchema(
    "force_constants",
    "One row per material of a chunk: how good its force constants are; they lie in the folder beside it.",
    [MATERIAL_ID, STATUS, REASON, *FORCE_CONSTANT_QUALITY],
)

RUNG = [
    Column(
        "rung",
        TEXT,
        "rung of the ladder (docs/soft-modes.md) that left no imaginary mode: crystal, supercells and force constants "
        "are its; null where none was needed or none helped",
    ),
    Column(
        "effective_temperature",
        REAL,
        "temperature of self-consistent FC2, which hold near it and not at others; null for those of 0 K",
        "K",
    ),
]
RUNGS = Column("rungs", TEXTS, "what each rung of the ladder came to; null where there was none", "", "(nrungs,)")

LADDER = TableSchema(
    "ladder",
    "One row per material of a chunk: what came of the ladder; crystal and supercells only where a rung changed them.",
    [MATERIAL_ID, STATUS, REASON, *CRYSTAL, *RELAXATION, *SUPERCELLS, *BORN, *FORCE_CONSTANT_QUALITY, *RUNG, RUNGS],
)

LADDER_RUNGS = TableSchema(
    "rungs",
    "One row per material of a chunk and rung that was tried.",
    [
        MATERIAL_ID,
        Column("step", INT, "number of the attempt, from 0"),
        Column("rung", TEXT, "which rung"),
        Column("status", TEXT, "stable, unstable, failed, or not run"),
        Column("detail", TEXT, "what was changed, or why it failed or was not run"),
        Column("min_frequency", REAL, "lowest frequency afterwards; imaginary ones are negative", "THz"),
        Column("min_frequency_q", VECTOR, "where it lies, in reciprocal vectors of the primitive cell", "", "(3,)"),
        Column("space_group_number", INT, "space group of the crystal afterwards"),
        Column("energy_per_atom", REAL, "energy of the crystal afterwards", "eV"),
        Column("fc2_atoms", INT, "atoms in the FC2 supercell afterwards"),
    ],
)

VERDICT = [
    Column("min_frequency", REAL, "lowest frequency on the mesh; imaginary ones are negative", "THz"),
    Column("min_frequency_q", VECTOR, "where it lies, in reciprocal vectors of the primitive cell", "", "(3,)"),
]

STABILITY = TableSchema(
    "stability",
    "One row per material of a chunk: whether it has imaginary modes.",
    [MATERIAL_ID, STATUS, REASON, *VERDICT],
)

AUDIT = TableSchema(
    "audit",
    "One row per quantity that an audit of a potential measured on a crystal.",
    [
        Column("check", TEXT, "what was tested"),
        Column("quantity", TEXT, "what was measured; all where the check could not be made"),
        Column("crystal", TEXT, "on which crystal"),
        Column("amplitude", REAL, "of the displacement; null where there is none", "angstrom"),
        Column("measured", REAL, "the number, in the unit of its row; null where there is none"),
        Column("unit", TEXT, "unit of measured and limit"),
        Column("limit", REAL, "largest value that passes; null where none is set"),
        Column("passed", FLAG, "whether it is within the limit; null where the row is not judged by itself"),
        Column("reason", TEXT, "why it did not pass; empty otherwise"),
    ],
)

AUDIT_CURVES = TableSchema(
    "audit_curves",
    "One row per curve of the figures of an audit.",
    [
        Column("check", TEXT, "what was tested"),
        Column("crystal", TEXT, "on which crystal"),
        Column("series", TEXT, "which curve of the check"),
        Column("x", REALS, "displacement or distance (angstrom), strain or scale (1), or time (ps)", "", "(npoints,)"),
        Column("y", REALS, "values", "", "(npoints,)"),
    ],
)

PROVENANCE = [
    STRUCTURE_HASH,
    Column("protocol_hash", TEXT, "names every physical setting (see manifest.json)"),
    ENGINE_HASH,
    Column(
        "engine_settings",
        TEXT,
        "what engine_hash names, as JSON: program and version, weights or pseudopotentials, ...",
    ),
    Column("software", TEXT, "versions of kappaflow, phonopy, phono3py, symfc and spglib, as JSON"),
]

METHOD = Column("method", TEXT, "rta (relaxation-time approximation) or lbte (direct solution)")
TEMPERATURE = Column("temperature", REAL, "temperature", "K")

SPECTRA = TableSchema(
    "spectra",
    "One row per material for its density of states, and one per material, method and temperature for what its "
    "conductivity accumulates from.",
    [
        MATERIAL_ID,
        METHOD,
        TEMPERATURE,
        Column("frequency", REALS, "abscissa of dos and kappa_frequency; imaginary ones are negative", "THz", "(n,)"),
        Column("dos", REALS, "phonon density of states; its integral is the number of modes", "1/THz", "(n,)"),
        Column(
            "kappa_frequency",
            REALS,
            "kappa of all modes up to that frequency; the coherence of a pair is shared in the ratio of heat "
            "capacities",
            "W/(m K)",
            "(n,)",
        ),
        Column(
            "mean_free_path",
            REALS,
            "abscissa of kappa_mean_free_path: group velocity times the lifetime 1 / (2 pi linewidth), from 1 angstrom "
            "on",
            "angstrom",
            "(m,)",
        ),
        Column("kappa_mean_free_path", REALS, "kappa of all modes up to that mean free path", "W/(m K)", "(m,)"),
    ],
)

MODES = TableSchema(
    "modes",
    "One row per material, method, temperature, irreducible q-point and band.",
    [
        MATERIAL_ID,
        METHOD,
        TEMPERATURE,
        Column("q", VECTOR, "q-point in reciprocal vectors of the primitive cell", "", "(3,)"),
        Column("weight", INT, "q-points of the mesh that symmetry makes equal to it"),
        Column("band", INT, "number of the band, from 0, in the order of frequencies"),
        Column("frequency", REAL, "frequency", "THz"),
        Column(
            "group_velocity",
            VECTOR,
            "group velocity (without 2 pi), Cartesian",
            "angstrom THz",
            "(3,)",
        ),
        Column("linewidth", REAL, "full width at half maximum, with isotopes where they scatter", "THz"),
        Column("heat_capacity", REAL, "heat capacity of the mode", "eV/K"),
        Column("gruneisen", REAL, "mode Grueneisen parameter from FC3; null where it is undefined"),
        Column("mode_kappa", TENSOR, "part of the Peierls conductivity, with the weight in it", "W/(m K)", "(3, 3)"),
    ],
)

KAPPA = TableSchema(
    "kappa",
    "One row per material, method and temperature: the lattice thermal conductivity. What a table from elsewhere does "
    "not say is null.",
    [
        MATERIAL_ID,
        ORIGIN,
        METHOD,
        TEMPERATURE,
        Column("kappa", REAL, "a third of the trace of kappa_total", "W/(m K)"),
        Column("kappa_p", REAL, "a third of the trace of kappa_peierls", "W/(m K)"),
        Column("kappa_c", REAL, "a third of the trace of kappa_coherence", "W/(m K)"),
        Column(
            "kappa_total",
            TENSOR,
            "Peierls plus coherence part, axes as in lattice_vectors",
            "W/(m K)",
            "(3, 3)",
        ),
        Column("kappa_peierls", TENSOR, "populations' (particle-like) part", "W/(m K)", "(3, 3)"),
        Column("kappa_coherence", TENSOR, "coherences' (wave-like, Wigner) part", "W/(m K)", "(3, 3)"),
        Column(
            "mesh_delta",
            REAL,
            "(kappa of the next coarser mesh - kappa) / kappa; null where no other mesh was asked for, or none that "
            "rounds to another grid",
        ),
        Column(
            "kappa_extrapolated",
            REAL,
            "kappa of an infinitely dense mesh, linear in 1 / (points per direction); null without a coarser mesh, or "
            "where it is negative",
            "W/(m K)",
        ),
        Column("mesh_error", REAL, "estimated error of kappa by its mesh, relative to kappa; null as before"),
        Column(
            "likely_too_high",
            TEXTS,
            "criteria of the literature by which three-phonon scattering alone gives too high a kappa, with their "
            "figures (docs/transport.md); empty where none holds",
            "",
            "(ncriteria,)",
        ),
        Column(
            "heat_capacity",
            REAL,
            "harmonic heat capacity at constant volume, per mole of atoms (3 R = 24.94)",
            "J/(K mol)",
        ),
        Column("entropy", REAL, "harmonic entropy, per mole of atoms", "J/(K mol)"),
        Column(
            "free_energy", REAL, "harmonic Helmholtz free energy with zero-point energy, per mole of atoms", "kJ/mol"
        ),
        Column(
            "gruneisen", REAL, "mean of the mode Grueneisen parameters weighted by heat capacity: the thermodynamic one"
        ),
        Column("q_mesh", INTS, "mesh of the Brillouin zone of the primitive cell", "", "(3,)"),
        Column("isotopes", FLAG, "scattering by the natural isotope mixture included"),
        Column("boundary_mfp", REAL, "length between boundaries that scatter; null for an infinite crystal", "um"),
        Column("nac", FLAG, "non-analytical (long-range dipole) term included"),
        NAC_SOURCE,
        Column(
            "nac_missing",
            FLAG,
            "not included although the crystal's symmetry allows Born charges: unless it is a metal, the splitting of "
            "longitudinal and transverse optical modes is missing",
        ),
        Column("stable", FLAG, "no imaginary mode beyond the tolerance"),
        *VERDICT[:1],
        *FORCE_CONSTANT_QUALITY[:2],
        SPACE_GROUP,
        *RUNG,
        YEAR,
        FLAGS,
        *PROVENANCE,
    ],
)

OF_THE_PHONONS = [
    Column("debye_temperature", REAL, "of the second moment of all frequencies: the one for high temperatures", "K"),
    Column("gap_ratio", REAL, "lowest optical over highest acoustic frequency; null without optical modes"),
    Column(
        "phase_space",
        REAL,
        "three-phonon phase space P3 of Lindsay and Broido, J. Phys.: Condens. Matter 20, 165209 (2008), in angular "
        "frequencies",
        "ps",
    ),
]

CONDUCTIVITY = TableSchema(
    "conductivity",
    "One row per material of a chunk: how its journey ended, and what its phonons say as a whole.",
    [MATERIAL_ID, STATUS, REASON, *OF_THE_PHONONS, Column("seconds", REAL, "wall time of the conductivity", "s")],
)

SRME = TableSchema(
    "srme",
    "One row per material of the kappa-103 benchmark in a chunk: its conductivity beside the reference (docs/srme.md).",
    [
        MATERIAL_ID,
        Column("reference_id", TEXT, "id of the material in the structures file and in the reference"),
        ENGINE,
        Column(
            "status",
            TEXT,
            "as in the other tables, or symmetry (another space group after relaxation), unmatched (modes that cannot "
            "be compared) or no reference; the last two do not count",
        ),
        REASON,
        TEMPERATURE,
        Column("kappa", REAL, "a third of the trace of the conductivity; null where there is none", "W/(m K)"),
        Column("kappa_ref", REAL, "the same of the reference", "W/(m K)"),
        Column("srd", REAL, "symmetric relative difference of kappa, -2 to 2"),
        Column("sre", REAL, "symmetric relative error of kappa, 0 to 2"),
        Column("srme", REAL, "symmetric relative mean error of the modes, 0 to 2"),
    ],
)

FREQUENCIES = TableSchema(
    "frequencies",
    "One row per material that is not of the reference engine: its phonon frequencies beside those of the same crystal "
    "by the reference, without non-analytical term, at q-points commensurate with the reference's supercell "
    "(docs/frequencies.md).",
    [
        MATERIAL_ID,
        Column("reference_id", TEXT, "material_id of the same crystal by the reference engine"),
        ENGINE,
        Column("chemical_formula_reduced", TEXT, "reduced formula, elements in alphabetical order"),
        Column(
            "status", TEXT, "ok (compared), no reference, or as in the other tables for one without force constants"
        ),
        REASON,
        Column("q_points", INT, "q-points that were compared"),
        Column("mae", REAL, "mean absolute difference of frequencies", "THz"),
        Column("max_error", REAL, "largest absolute difference", "THz"),
        Column("mean_error", REAL, "mean of frequency - frequency_reference", "THz"),
        Column("softening", REAL, "slope through the origin of frequency over frequency_reference"),
        Column("min_frequency", REAL, "lowest frequency at these q-points; imaginary ones are negative", "THz"),
        Column("min_frequency_reference", REAL, "the same of the reference", "THz"),
        Column("volume_ratio", REAL, "volume of the crystal over that of the reference"),
        Column("frequency", REALS, "all frequencies, by q-point and ascending", "THz", "(nmodes,)"),
        Column("frequency_reference", REALS, "the same of the reference", "THz", "(nmodes,)"),
    ],
)

MATERIALS = TableSchema(
    "materials",
    "One row per entry of the material list: the (relaxed) crystal, what was done to it and how it ended.",
    [
        MATERIAL_ID,
        ORIGIN,
        SOURCE,
        ENGINE,
        STATUS,
        REASON,
        FLAGS,
        DUPLICATE_OF,
        *CRYSTAL,
        *RELAXATION,
        *SUPERCELLS,
        *BORN,
        *FORCE_CONSTANT_QUALITY,
        *VERDICT,
        *OF_THE_PHONONS,
        *RUNG,
        RUNGS,
        *PROVENANCE,
    ],
)

FAILURES = TableSchema(
    "failures",
    "One row per material that has no conductivity, and per ingested file that could not be used.",
    [MATERIAL_ID, ORIGIN, SOURCE, STATUS, REASON],
)

INGESTED_FILES = TableSchema(
    "ingested_files",
    "One row per file that `snakemake ingest` looked at, those in archives included.",
    [
        ORIGIN,
        Column("file", TEXT, "path below the source; what follows :: is inside an archive"),
        Column("bytes", INT, "size, uncompressed", "byte"),
        Column("sha256", TEXT, "of the uncompressed content"),
        Column("kind", TEXT, "what it was read as; empty where it is nothing of interest"),
        Column("calculations", INT, "calculations found in it"),
        Column("status", TEXT, "ok, duplicate (same content as an earlier file), refused, or ignored (no calculation)"),
        REASON,
        Column("material_id", TEXT, "the set of displacements that took its calculations; empty for none"),
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
        STRUCTURE_HASH,
        YEAR,
        *CRYSTAL,
    ],
)

SKIPPED_LABELS = TableSchema(
    "skipped_labels",
    "One row per row of an outside table that gave no label, and why.",
    [
        Column("row", INT, "position in the outside table, from 0"),
        MATERIAL_ID,
        Column("kappa", REAL, "conductivity as found; nan where the cell is not a number", "W/(m K)", finite=False),
        REASON,
    ],
)

PROTOTYPES = TableSchema(
    "prototypes",
    "One row per labelled material: the prototype that its structure matches.",
    [MATERIAL_ID, Column("prototype", TEXT, "anonymous formula, space group and number of the prototype")],
)

PHONON_FEATURES = TableSchema(
    "phonon_features",
    "One row per material: its phonons as features of surrogates.",
    [
        MATERIAL_ID,
        STRUCTURE_HASH,
        STATUS,
        REASON,
        Column(
            "values",
            REALS,
            "the features, in the order of surrogates.features.phonons.NAMES; nan where unknown",
            "",
            "(nfeatures,)",
            finite=False,
        ),
    ],
)

FEATURES = TableSchema(
    "features",
    "One row per labelled material: one feature set of it.",
    [
        MATERIAL_ID,
        Column(
            "values",
            REALS,
            "the features, in the order of `names`, nan where unknown; null where the crystal has none",
            "",
            "(nfeatures,)",
            finite=False,
        ),
        Column("names", TEXTS, "their names, in the first row only", "", "(nnames,)"),
        REASON,
    ],
)

SPLIT = TableSchema(
    "split",
    "One row per material: on which side of the split all of its rows stand.",
    [
        MATERIAL_ID,
        Column("subset", TEXT, "train, validation, test, or unused"),
        Column("reason", TEXT, "why the material, or the whole split, is unused; empty otherwise"),
    ],
)

LEAKAGE = TableSchema(
    "leakage",
    "One row per test or validation material: its nearest neighbours on the train side.",
    [
        MATERIAL_ID,
        Column("split", TEXT, "name of the split"),
        Column("seed", INT, "seed of the split"),
        Column("subset", TEXT, "validation or test"),
        Column("nearest_composition", TEXT, "train material with the most similar composition"),
        Column(
            "composition_distance", REAL, "half the sum of the absolute differences of the atomic fractions, 0 to 1"
        ),
        Column("nearest_structure", TEXT, "train material with the most similar composition and structure descriptors"),
        Column(
            "structure_distance",
            REAL,
            "distance in standardised descriptors over the median distance of a train material to its nearest one",
        ),
        Column("same_formula", FLAG, "whether train has the same reduced formula"),
        Column("same_chemical_system", FLAG, "whether train has the same set of elements"),
        Column("same_prototype", FLAG, "whether train has the same prototype"),
        Column("same_space_group", FLAG, "whether train has the same space group"),
    ],
)

PREDICTIONS = TableSchema(
    "predictions",
    "One row per labelled calculation, model, split and seed: what a surrogate fitted on train says of it.",
    [
        MATERIAL_ID,
        Column("split", TEXT, "name of the split; random@25 is trained on 25 % of its train side"),
        Column("model", TEXT, "name of the surrogate"),
        Column("family", TEXT, "family of the surrogate"),
        Column("seed", INT, "seed of the draws of the split and of the model"),
        Column("subset", TEXT, "train, validation, test or unused"),
        Column("kappa", REAL, "label", "W/(m K)"),
        Column("kappa_predicted", REAL, "prediction; null where the model does not apply", "W/(m K)"),
        Column("ln_std", REAL, "standard deviation of the logarithm of the prediction"),
        Column("composition_distance", REAL, "to the nearest train material, see `leakage`; null for train"),
        Column("structure_distance", REAL, "to the nearest train material, see `leakage`; null for train"),
        Column("has_phonons", FLAG, "whether phonons of the potential are known of the material"),
        Column("reason", TEXT, "why there is no prediction; empty otherwise"),
    ],
)

FITS = TableSchema(
    "fits",
    "One row per model, split and seed: how the fit went.",
    [
        Column("split", TEXT, "name of the split"),
        Column("model", TEXT, "name of the surrogate"),
        Column("family", TEXT, "family of the surrogate"),
        Column("seed", INT, "seed of the draws of the split and of the model"),
        Column("n_train", INT, "train materials that the model learned from"),
        Column("n_validation", INT, "validation materials that choices were made on"),
        Column("n_test", INT, "test materials that it predicts"),
        Column("fit_seconds", REAL, "time of the fit", "s"),
        Column("predict_seconds", REAL, "time of the prediction of 1,000 crystals whose features are known", "s"),
        Column("told_bound", FLAG, "whether the model was told on which side of a kappa all test labels lie"),
        Column("chosen", TEXT, "what was chosen on validation, as JSON"),
        Column("train_sha256", TEXT, "hash of the rows that the model learned from and was chosen on"),
        Column("reason", TEXT, "why there is no fit; empty otherwise"),
    ],
)

LEADERBOARD = TableSchema(
    "leaderboard",
    "One row per split, scope and model, best first: how well it predicts test materials, beside the best constant. "
    "A material with several rows counts once, with geometric means.",
    [
        Column("split", TEXT, "name of the split"),
        Column("scope", TEXT, "all test materials, or only those of the subset with phonons of a potential (phonons)"),
        Column("model", TEXT, "name of the surrogate"),
        Column("family", TEXT, "family of the surrogate"),
        Column(
            "n_seeds", INT, "seeds with a score; values are means over these, each a draw of the model and the split"
        ),
        Column("seeds", TEXT, "these seeds"),
        Column("n_train", INT, "materials in the train set (mean over seeds)"),
        Column("n_validation", INT, "materials in the validation set (mean over seeds)"),
        Column("n_test", INT, "test materials of the scope (mean over seeds)"),
        Column("n_materials", INT, "different test materials of the scope over all seeds; intervals resample these"),
        Column("told_bound", FLAG, "the model was told the value that bounds the labels of the test set"),
        Column("mae_ln", REAL, "mean absolute error of ln kappa; the order of the table"),
        Column(
            "mae_ln_low", REAL, "lower end of its 95 % bootstrap interval over test materials; null for one material"
        ),
        Column("mae_ln_high", REAL, "upper end of its 95 % bootstrap interval over test materials"),
        Column("mae_ln_seed_std", REAL, "standard deviation of mae_ln over seeds; null for one seed"),
        Column("rmse_ln", REAL, "root mean square error of ln kappa"),
        Column("r2_ln", REAL, "coefficient of determination of ln kappa; null where undefined"),
        Column("spearman", REAL, "rank correlation of label and prediction; null where undefined, as for a constant"),
        Column("weighted_error", REAL, "mean absolute error of ln kappa, weighted by min(1, (2 W/(m K) / label)^2)"),
        Column(
            "enrichment_low", REAL, "share of the true lowest tenth in the predicted one, over that of a random choice"
        ),
        Column("enrichment_high", REAL, "the same of the highest tenth; random is 1, perfect is 10"),
        Column(
            "coverage_68", REAL, "fraction of labels within one standard deviation of the prediction; nominal 0.6827"
        ),
        Column(
            "coverage_95", REAL, "fraction of labels within two standard deviations of the prediction; nominal 0.9545"
        ),
        Column(
            "nll", REAL, "mean negative log likelihood of the label under the Gaussian prediction of ln kappa, in nat"
        ),
        Column("miscalibration_area", REAL, "area between observed and nominal coverage; 0 best, 0.5 worst"),
        Column("mae", REAL, "mean absolute error of kappa", "W/(m K)"),
        Column("within_factor_2", REAL, "fraction of test materials predicted within a factor of two"),
        Column("is_constant", FLAG, "the model is a constant: a baseline with the same prediction for every material"),
        Column("best_constant", TEXT, "the constant with the smallest mae_ln of the split and scope"),
        Column("mae_constant", REAL, "mae_ln of that constant on the seeds of this model"),
        Column("mae_ratio", REAL, "mae_ln divided by that of the best constant (of the same split, scope and seeds)"),
        Column("mae_ratio_low", REAL, "lower end of its 95 % interval, by a paired bootstrap over test materials"),
        Column("mae_ratio_high", REAL, "upper end of its 95 % interval, by a paired bootstrap over test materials"),
        Column("rmse_ratio", REAL, "rmse_ln divided by that of the constant with the smallest rmse_ln"),
        Column("rmse_ratio_low", REAL, "lower end of its paired 95 % interval"),
        Column("rmse_ratio_high", REAL, "upper end of its paired 95 % interval"),
        Column(
            "weighted_ratio", REAL, "weighted_error divided by that of the constant with the smallest weighted_error"
        ),
        Column("weighted_ratio_low", REAL, "lower end of its paired 95 % interval"),
        Column("weighted_ratio_high", REAL, "upper end of its paired 95 % interval"),
        Column(
            "beats_constant", TEXT, "yes (mae_ratio_high < 1), no (mae_ratio_low > 1) or unclear; null for constants"
        ),
        Column(
            "mae_oracle_constant", REAL, "mae_ln of the median of the test labels: no constant has less; no competitor"
        ),
        Column("fit_seconds", REAL, "time to fit (mean over seeds)", "s"),
        Column("predict_seconds", REAL, "time to predict 1000 crystals (mean over seeds)", "s"),
        Column("reason", TEXT, "why the model, or a seed of it, has no score; empty otherwise"),
    ],
)

PUBLISHED = (MATERIALS, KAPPA, SPECTRA, MODES, FORCES, FAILURES)
"""The tables of the dataset; modes is a folder with a file per material, and optional."""
