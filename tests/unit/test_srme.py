"""The kappa-103 benchmark: its formulas against an independent computation, its files, and which modes are compared."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk
from ase.io import write

from kappaflow import plots_srme
from kappaflow.campaign import Campaign
from kappaflow.config import ConfigError, complete
from kappaflow.dataset import schemas, tables
from kappaflow.dataset.tables import Row
from kappaflow.ledger import Ledger, ledger_path
from kappaflow.phonons import conductivity, phono3py_api, phono3py_transport
from kappaflow.protocol import Conductivity, QMesh
from kappaflow.srme import comparison, reference, structures

SETTINGS = Conductivity(["rta"], [200.0, 300.0], True, QMesh(10.0, {"Cu-hcp": [5, 5, 4], "Cu-fcc": [5, 5, 5]}), None)
EMT = {"name": "ase", "calculator": "ase.calculators.emt.EMT"}
ROOT = Path(__file__).parents[2]


def by_hand(phonon: Any, mesh: list[int]) -> Row:
    """A row of the reference: phono3py's Wigner conductivity at 300 K, split into modes as k_SRME does, in plain loops.

    The mesh's numbers are those of k_SRME: summed over the star, not divided by the number of q-points.
    """
    phonon.mesh_numbers = mesh
    phonon.init_phph_interaction()
    phonon.run_thermal_conductivity(temperatures=[300.0], is_isotope=True, transport_type="SMM19")
    result = phonon.thermal_conductivity
    pairs, capacity = result.mode_kappa_matrix[0][0], result.mode_heat_capacities[0]
    points, bands = capacity.shape
    modes = np.zeros((points, bands))
    for q in range(points):
        for s in range(bands):
            modes[q, s] += pairs[q, s, s, :3].mean()
            for other in range(bands):
                both = capacity[q, s] + capacity[q, other]
                if other != s and both > 0:
                    modes[q, s] += 2 * pairs[q, other, s, :3].mean() * capacity[q, other] / both
    return {
        "mp_id": "",
        "kappa_TOT_ave": [float(result.kappa[0][0][:3].mean())],
        "mode_kappa_TOT_ave": [modes.tolist()],
        "weights": result.grid_weights.tolist(),
        "q_points": result.qpoints.tolist(),
    }


def errors_by_hand(ours: Row, theirs: Row) -> tuple[float, float, float]:
    """SRD, SRE and SRME of two rows, with loops over the modes."""
    total = ours["kappa_TOT_ave"][0] + theirs["kappa_TOT_ave"][0]
    srd = 2 * (ours["kappa_TOT_ave"][0] - theirs["kappa_TOT_ave"][0]) / total
    deviation = 0.0
    for own, other in zip(ours["mode_kappa_TOT_ave"][0], theirs["mode_kappa_TOT_ave"][0], strict=True):
        for a, b in zip(own, other, strict=True):
            deviation += abs(a - b)
    return srd, abs(srd), 2 * deviation / sum(ours["weights"]) / total


def table_of(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """Rows as pandas' to_json writes them."""
    named = [row | {"mp_id": name} for name, row in rows.items()]
    return {key: {str(number): row[key] for number, row in enumerate(named)} for key in named[0]}


@pytest.fixture(scope="module")
def crystals(copper: Row, hcp_copper: Row) -> list[Row]:
    return [crystal | {"space_group_number_input": crystal["space_group_number"]} for crystal in (copper, hcp_copper)]


@pytest.fixture(scope="module")
def files(
    fcc_phonon: Callable[..., Any], hcp_phonon: phono3py_api.Phono3py, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("force_constants")
    phono3py_api.save_force_constants(fcc_phonon("symfc"), "symfc", folder / "Cu-fcc")
    phono3py_api.save_force_constants(hcp_phonon, "symfc", folder / "Cu-hcp")
    return folder


@pytest.fixture(scope="module")
def known(files: Path) -> dict[str, Row]:
    """The reference: the same force constants, by hand."""
    meshes = SETTINGS.q_mesh.meshes
    return {
        f"mp-{name}": by_hand(phono3py_api.load_force_constants(files / f"Cu-{name}"), meshes[f"Cu-{name}"])
        for name in ("fcc", "hcp")
    }


@pytest.fixture(scope="module")
def compared(
    crystals: list[Row], files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Row]]:
    """``compared(reference)``: rows of the table by the reference's id; the ledger is kept between calls."""
    ledger = tmp_path_factory.mktemp("ledger")

    def compare(known: dict[str, Row], more: list[Row] | None = None, relaxed: list[Row] | None = None) -> Any:
        status = [{"material_id": row["material_id"], "status": "ok", "reason": ""} for row in crystals]
        ids = {f"Cu-{name}": f"mp-{name}" for name in ("fcc", "hcp", "bcc", "other")}
        rows = comparison.compare_chunk(
            [*status, *(more or [])], relaxed or crystals, files, ids, known, SETTINGS, 300.0, ledger, "default"
        )
        tables.to_arrow(rows, schemas.SRME)
        return {row["reference_id"]: row for row in rows}

    return compare


@pytest.fixture
def in_file(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``in_file(rows)``: the same after a reference file was written and read."""

    def through(rows: dict[str, Row], name: str = "reference.json.gz") -> dict[str, Any]:
        text = json.dumps(table_of(rows))
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return reference.read(tmp_path / name)

    return through


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_the_same_force_constants_have_no_error(
    compared: Callable[..., Any], known: dict[str, Row], in_file: Callable[..., Any]
) -> None:
    rows = compared(in_file(known))
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert row["kappa"] == pytest.approx(known[name]["kappa_TOT_ave"][0], rel=1e-9)
        assert (row["kappa_ref"], row["temperature"]) == (known[name]["kappa_TOT_ave"][0], 300)
        assert max(row["sre"], row["srme"]) < 1e-6


def test_coherences_are_split_as_in_the_reference(known: dict[str, Row], crystals: list[Row], files: Path) -> None:
    """hcp has optical modes: with the shares of our own table of modes the error would not vanish."""
    phonon = phono3py_api.load_force_constants(files / "Cu-hcp")
    phono3py_transport.conductivity(phonon, [5, 5, 4], [300.0], "rta", True)
    modes = phono3py_transport.modes(phonon)
    ours, theirs = comparison.mode_conductivities(modes)[0], np.array(known["mp-hcp"]["mode_kappa_TOT_ave"][0])
    assert ours == pytest.approx(theirs, abs=1e-9 * theirs.max())
    assert np.abs(modes.kappa[0] * modes.weight.sum() - theirs).max() > 1e-5 * theirs.max()
    assert ours.sum() == pytest.approx(modes.kappa[0].sum() * modes.weight.sum())
    with pytest.raises(ValueError, match="coherence_exchanged"):
        comparison.mode_conductivities(replace(modes, coherence_exchanged=None))


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_scaled_reference(compared: Callable[..., Any], known: dict[str, Row], factor: float) -> None:
    keys = ("kappa_TOT_ave", "mode_kappa_TOT_ave")
    scaled = {name: row | {key: (factor * np.array(row[key])).tolist() for key in keys} for name, row in known.items()}
    rows = compared(scaled)
    expected = 2 * (1 - factor) / (1 + factor)
    for name in known:
        # No mode has a negative conductivity, so the modes add up to the error of the sum.
        assert np.min(known[name]["mode_kappa_TOT_ave"]) >= 0
        assert rows[name]["srd"] == pytest.approx(expected, abs=1e-6)
        assert rows[name]["sre"] == pytest.approx(abs(expected), abs=1e-6)
        assert rows[name]["srme"] == pytest.approx(abs(expected), abs=1e-6)


def test_other_modes_with_the_same_sum(compared: Callable[..., Any], known: dict[str, Row]) -> None:
    exchanged = {
        name: row | {"mode_kappa_TOT_ave": np.array(row["mode_kappa_TOT_ave"])[:, :, ::-1].tolist()}
        for name, row in known.items()
    }
    rows = compared(exchanged)
    for name in known:
        srd, sre, srme = errors_by_hand(known[name], exchanged[name])
        assert srd == 0
        assert rows[name]["sre"] == pytest.approx(sre, abs=1e-6)
        assert rows[name]["srme"] == pytest.approx(srme, rel=1e-6)
        assert 0.01 < srme < 2


def test_another_reference_by_hand(compared: Callable[..., Any], known: dict[str, Row]) -> None:
    rng = np.random.default_rng(7)
    other = {}
    for name, row in known.items():
        modes = np.array(row["mode_kappa_TOT_ave"]) * rng.uniform(0.2, 2, np.shape(row["mode_kappa_TOT_ave"]))
        kappa = modes[0].sum() / sum(row["weights"])
        other[name] = row | {"kappa_TOT_ave": [float(kappa)], "mode_kappa_TOT_ave": modes.tolist()}
    rows = compared(other)
    for name in known:
        found = [rows[name][key] for key in ("srd", "sre", "srme")]
        assert found == pytest.approx(errors_by_hand(known[name], other[name]), rel=1e-6)


# --- which modes are compared ----------------------------------------------------------------------------------------


def test_q_points_in_another_order_and_of_another_star(compared: Callable[..., Any], known: dict[str, Row]) -> None:
    """Minus q plus a reciprocal vector is the same mode: time reversal."""
    moved = {}
    for name, row in known.items():
        turn = np.random.default_rng(3).permutation(len(row["weights"]))
        moved[name] = {
            "kappa_TOT_ave": row["kappa_TOT_ave"],
            "mode_kappa_TOT_ave": np.array(row["mode_kappa_TOT_ave"])[:, turn].tolist(),
            "weights": np.array(row["weights"])[turn].tolist(),
            "q_points": (np.round(1 - np.array(row["q_points"])[turn], 6)).tolist(),
        }
    assert max(row["srme"] for row in compared(moved).values()) < 1e-6
    for row in moved.values():
        del row["q_points"]
    assert {row["status"] for row in compared(moved).values()} == {"unmatched"}  # the order alone is wrong


def test_what_cannot_be_matched_does_not_count(compared: Callable[..., Any], known: dict[str, Row]) -> None:
    coarse = {name: {key: value for key, value in row.items() if key != "q_points"} for name, row in known.items()}
    coarse["mp-fcc"]["mode_kappa_TOT_ave"] = np.array(known["mp-fcc"]["mode_kappa_TOT_ave"])[:, 1:].tolist()
    coarse["mp-fcc"]["weights"] = known["mp-fcc"]["weights"][1:]
    coarse["mp-hcp"]["weights"] = [weight + 1 for weight in known["mp-hcp"]["weights"]]
    rows = compared(coarse)
    points = len(known["mp-fcc"]["weights"])
    expected = f"the reference has {points - 1} irreducible q-points of 3 bands, this mesh {points} of 3"
    assert rows["mp-fcc"]["reason"] == expected
    assert rows["mp-hcp"]["reason"].startswith("the weights of ")
    for row in rows.values():
        assert row["status"] == "unmatched"
        assert row["kappa"] > 0
        assert row.get("srme") is None
    strange = {**known, "mp-fcc": known["mp-fcc"] | {"q_points": (np.array(known["mp-fcc"]["q_points"]) / 2).tolist()}}
    assert compared(strange)["mp-fcc"]["reason"].startswith("the reference has no q-point equal to (")


def test_matching_needs_no_weights(compared: Callable[..., Any], known: dict[str, Row]) -> None:
    bare = {name: {key: row[key] for key in ("kappa_TOT_ave", "mode_kappa_TOT_ave")} for name, row in known.items()}
    assert max(row["srme"] for row in compared(bare).values()) < 1e-6


def test_a_record_of_an_earlier_version_is_made_again(
    known: dict[str, Row], crystals: list[Row], files: Path, tmp_path: Path
) -> None:
    path = ledger_path(tmp_path, crystals[0]["structure_hash"])
    phonon = phono3py_api.load_force_constants(files / "Cu-fcc")
    conductivity.conduct(crystals[0], phonon, SETTINGS, Ledger(path))
    record = json.loads(path.read_text())
    for content in record.values():
        del content["modes"]["coherence_exchanged"]
    path.write_text(json.dumps(record) + "\n")
    for _ in range(2):
        ((_, _, modes),) = conductivity.conduct(crystals[0], phonon, SETTINGS, Ledger(path), exchanged=True)
        assert modes.coherence_exchanged is not None
        assert len(Ledger(path)) == 2
    ((_, _, modes),) = conductivity.conduct(crystals[0], phonon, SETTINGS, Ledger(path))
    assert modes.coherence_exchanged is None
    assert len(Ledger(path)) == 2


# --- what counts -----------------------------------------------------------------------------------------------------


def test_no_conductivity_counts_as_two(
    compared: Callable[..., Any], known: dict[str, Row], crystals: list[Row], tmp_path: Path
) -> None:
    more = [
        {"material_id": "Cu-bcc", "status": "unstable", "reason": "imaginary mode of 1i THz"},
        {"material_id": "Cu-other", "status": "ok", "reason": ""},
        {"material_id": "not-in-the-benchmark", "status": "ok", "reason": ""},
    ]
    changed = [crystals[0], crystals[1] | {"space_group_number_input": 1}]
    rows = compared({**known, "mp-bcc": known["mp-fcc"]}, more, [*changed, {"material_id": "Cu-other"}])
    assert {name: row["status"] for name, row in rows.items()} == {
        "mp-fcc": "ok",
        "mp-hcp": "symmetry",
        "mp-bcc": "unstable",
        "mp-other": "no reference",
    }
    assert rows["mp-hcp"]["reason"] == "space group 1 became 194"
    for name in ("mp-hcp", "mp-bcc"):
        assert [rows[name][key] for key in ("srd", "sre", "srme")] == [-2, 2, 2]
        assert rows[name]["kappa_ref"] > 0

    tables.write(tmp_path / "rows.parquet", rows.values(), schemas.SRME)
    kept = tables.read(tmp_path / "rows.parquet")
    (line,) = comparison.summarise(kept, 103)
    counts = {key: line[key] for key in ("references", "counted", "computed", "left_out")}
    assert counts == {"references": 103, "counted": 3, "computed": 1, "left_out": 1}
    assert [line["mSRME"], line["mSRE"], line["mSRD"]] == pytest.approx([4 / 3, 4 / 3, -4 / 3], abs=1e-6)
    assert line["mSRME_computed"] == pytest.approx(0, abs=1e-6)
    comparison.write(kept, 103, tmp_path / "srme.csv", tmp_path / "summary.csv")
    with open(tmp_path / "srme.csv", newline="") as file:
        written = {row["reference_id"]: row for row in csv.DictReader(file)}
    assert (written["mp-bcc"]["SRME"], written["mp-bcc"]["kappa"], written["mp-other"]["SRME"]) == ("2.0", "", "")
    plots_srme.figures(kept, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["parity.svg", "srme.svg"]
    plots_srme.figures([row for row in kept if row["srme"] is None], tmp_path / "nothing")  # nothing could be compared


def test_imaginary_modes_by_the_rule_of_the_benchmark() -> None:
    q = np.array([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0]])
    stable = np.array([[-0.009, 0.0, 0.001, 3.0], [0.0, 1.0, 1.0, 4.0]])
    assert comparison.imaginary(q, stable) == ""
    for place, value in (((0, 0), -0.011), ((1, 0), -0.001)):
        frequency = stable.copy()
        frequency[place] = value
        assert f"{-value:g}i THz at q = ({q[place[0]][0]:g}, 0, 0)" in comparison.imaginary(q, frequency)
    optical = np.array([[-0.005, -0.004, -0.003, -0.002]])
    assert "0.002i THz" in comparison.imaginary(q[:1], optical)


def test_an_unstable_crystal_that_passed_the_stability_stage(
    bcc_copper: Row, bcc_phonon: phono3py_api.Phono3py, known: dict[str, Row], tmp_path: Path
) -> None:
    phono3py_api.save_force_constants(bcc_phonon, "symfc", tmp_path / "Cu-bcc")
    crystal = bcc_copper | {"space_group_number_input": bcc_copper["space_group_number"]}
    status = [{"material_id": "Cu-bcc", "status": "ok", "reason": ""}]
    settings = replace(SETTINGS, temperatures=[300.0], q_mesh=QMesh(10.0, {"Cu-bcc": [4, 4, 4]}))
    (row,) = comparison.compare_chunk(
        status,
        [crystal],
        tmp_path,
        {"Cu-bcc": "mp-bcc"},
        {"mp-bcc": known["mp-fcc"]},
        settings,
        300.0,
        tmp_path / "ledger",
        "default",
    )
    assert (row["status"], row["srd"], row["srme"]) == ("unstable", -2, 2)
    assert row["reason"].endswith("none allowed on the benchmark's mesh")


# --- the reference file ----------------------------------------------------------------------------------------------


def test_both_sets_of_names_and_tensors(known: dict[str, Row], in_file: Callable[..., Any]) -> None:
    row = known["mp-hcp"]
    mean = np.array(row["mode_kappa_TOT_ave"])
    tensors = np.concatenate([np.stack([mean * 0.5, mean, mean * 1.5], -1), np.ones((*mean.shape, 3))], -1)
    kappa = row["kappa_TOT_ave"][0]
    other = {
        "kappa_tot_rta": [[kappa / 2, kappa, kappa * 1.5, 0, 0, 0]],
        "mode_kappa_tot_rta": tensors.tolist(),
        "mode_weights": row["weights"],
    }
    one, two = (reference.select(in_file({"mp-hcp": found})["mp-hcp"], 300) for found in (row, other))
    assert two.kappa == pytest.approx(one.kappa)
    assert two.modes == pytest.approx(one.modes)
    assert (two.weight == one.weight).all()
    assert (one.q is not None, two.q) == (True, None)


def test_temperatures_of_the_reference(known: dict[str, Row]) -> None:
    row = known["mp-fcc"]
    with pytest.raises(reference.Unusable, match="the reference is for 300 K, not 200 K"):
        reference.select(row, 200)
    both = {key: [row[key][0], row[key][0]] for key in ("kappa_TOT_ave", "mode_kappa_TOT_ave")}
    both["kappa_TOT_ave"] = [1.0, 2.0]
    assert reference.select(row | both | {"temperatures": [200, 300]}, 300).kappa == 2
    assert reference.select(row | both, 300).kappa == 1  # the first one


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kappa_TOT_ave": None}, "the reference has no kappa_TOT_ave"),
        ({"kappa_TOT_ave": [float("nan")]}, "values that are no numbers"),
        ({"kappa_TOT_ave": [0.0]}, "kappa = 0"),
        ({"kappa_TOT_ave": "text"}, "no array of numbers"),
        ({"mode_kappa_TOT_ave": [[1.0, 2.0]]}, "of 2 axes, allowed: 3"),
        ({"weights": [1, 2]}, "weights of shape"),
        ({"q_points": [[0, 0, 0]]}, "q_points of shape"),
    ],
)
def test_rows_that_cannot_be_used(known: dict[str, Row], change: Row, reason: str) -> None:
    with pytest.raises(reference.Unusable, match=reason):
        reference.select(known["mp-fcc"] | change, 300)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "allowed: json or json.gz"),
        (b"[1]", "found no table"),
        (b'{"mp_id": {"0": "a"}}', "found the columns mp_id, allowed: one of kappa_TOT_ave"),
        (b'{"mp_id": {"0": "a", "1": "a"}, "kappa_tot_avg": {}, "mode_kappa_tot_avg": {}}', "found 'a' twice"),
    ],
)
def test_files_that_are_no_reference(tmp_path: Path, content: bytes, said: str) -> None:
    for name, packed in (("r.json", content), ("r.json.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=r"^srme.reference: ") as caught:
            reference.read(tmp_path / name)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    damaged = bytearray(gzip.compress(content))
    damaged[10] ^= 0xFF  # no block of deflate begins so
    for unreadable in (content, bytes(damaged)):
        (tmp_path / "r.json.gz").write_bytes(unreadable)
        with pytest.raises(ValueError, match=r"allowed: json or json\.gz"):
            reference.read(tmp_path / "r.json.gz")


# --- the structures file ---------------------------------------------------------------------------------------------


def frame(atoms: Atoms, **info: Any) -> Atoms:
    crystal = atoms.copy()
    matrices = {"fc2_supercell": np.diag([4, 4, 4]), "fc3_supercell": np.diag([2, 2, 2]), "q_mesh": [19, 19, 19]}
    crystal.info = {key: value for key, value in (matrices | info).items() if value is not None}
    return crystal


SALT = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
WURTZITE = bulk("ZnO", "wurtzite", a=3.25, c=5.2)
OF_PRIMITIVE = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])


def rutile(axes: list[int]) -> Atoms:
    """Rutile with its cell vectors in another order."""
    x = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.3, 0.3, 0], [0.7, 0.7, 0], [0.8, 0.2, 0.5], [0.2, 0.8, 0.5]])
    return Atoms("Ti2O4", cell=np.diag(np.array([4.6, 4.6, 2.96])[axes]), scaled_positions=x[:, axes], pbc=True)


@pytest.mark.parametrize(
    ("atoms", "matrix", "multiples"),
    [
        (SALT, np.diag([4, 4, 4]), [4, 4, 4]),
        (bulk("NaCl", "rocksalt", a=5.64), 2 * OF_PRIMITIVE, [2, 2, 2]),  # of the primitive cell
        (bulk("NaCl", "rocksalt", a=5.64), np.diag([4, 4, 4]), None),  # rhombohedral
        (SALT, np.diag([2, 2, 3]), None),  # not cubic
        (SALT, np.array([[2, 2, 0], [0, 2, 0], [0, 0, 2]]), [2, 2, 2]),  # other vectors of the same lattice
        (SALT, np.array([[2, 1, 0], [0, 2, 0], [0, 0, 2]]), None),
        (WURTZITE, np.diag([5, 5, 3]), [5, 5, 3]),
        (WURTZITE, np.diag([5, 4, 3]), None),
        (rutile([0, 1, 2]), np.diag([2, 2, 3]), [2, 2, 3]),
        (rutile([2, 0, 1]), np.diag([3, 2, 2]), [2, 2, 3]),  # c comes first in the file
        (SALT.repeat((2, 1, 1)), np.diag([1, 2, 2]), [2, 2, 2]),
    ],
)
def test_supercells_of_the_file_as_multiples_of_the_conventional_cell(
    atoms: Atoms, matrix: np.ndarray, multiples: list[int] | None, row_of: Callable[..., Row], rotation: np.ndarray
) -> None:
    turned = atoms.copy()
    turned.set_cell(atoms.cell @ rotation.T, scale_atoms=True)
    for crystal in (atoms, turned):
        crystal.info = {"fc2_supercell": matrix, "fc3_supercell": matrix, "q_mesh": [1, 1, 1]}
        if multiples is None:
            with pytest.raises(ValueError, match="allowed: a multiple of the conventional cell"):
                structures.supercells(crystal, 1e-5)
        else:
            expected = {"fc2_supercell": multiples, "fc3_supercell": multiples, "mesh": [1, 1, 1]}
            assert structures.supercells(crystal, 1e-5) == expected
    if multiples is not None:  # the supercell has the same number of atoms
        conventional = len(row_of(atoms)["species_at_sites"])
        assert conventional * np.prod(multiples) == len(atoms) * round(abs(np.linalg.det(matrix)))


def test_the_files_supercells_reach_the_protocol(tmp_path: Path) -> None:
    write(
        tmp_path / "s.extxyz",
        [
            frame(SALT, mp_id="mp-1"),
            frame(
                WURTZITE, material_id="no mp-3", fc2_supercell=np.diag([5, 5, 3]), q_mesh=None, q_point_mesh=[9, 9, 7]
            ),
        ],
    )
    config = {
        "materials": [],
        "engine": EMT,
        "engines": {"other": EMT},
        "srme": {"structures": str(tmp_path / "s.extxyz"), "engines": ["default", "other"]},
        "protocol": {"conductivity": {"q_mesh": {"meshes": {"mp-1": [3, 3, 3]}}}},
        "results": str(tmp_path / "results"),
    }
    campaign = Campaign.load(config)
    assert [entry.material_id for entry in campaign.entries] == ["mp-1", "no_mp-3", "mp-1-other", "no_mp-3-other"]
    assert campaign.srme_materials["no_mp-3-other"] == "no_mp-3"
    protocol = campaign.protocol
    assert protocol.displacements.fc2_supercell.matrices["no_mp-3-other"] == [5, 5, 3]
    assert protocol.displacements.fc3_supercell.matrices["mp-1"] == [2, 2, 2]
    meshes = protocol.conductivity.q_mesh.meshes
    assert meshes == {"mp-1": [3, 3, 3], "mp-1-other": [19] * 3, "no_mp-3": [9, 9, 7], "no_mp-3-other": [9, 9, 7]}
    with pytest.raises(ConfigError, match=r"config.srme.reference: found null"):
        campaign.srme_chunks()
    config["srme"]["reference"] = "nowhere.json"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"config.srme.reference: nowhere.json: not found"):
        Campaign.load(config).srme_chunks()
    (tmp_path / "r.json").touch()
    config["srme"]["reference"] = str(tmp_path / "r.json")  # type: ignore[index]
    assert len(Campaign.load(config).srme_chunks()) == 4


@pytest.mark.parametrize(
    ("info", "settings", "said"),
    [
        ({"mp_id": None}, {}, "found no material_id or mp_id"),
        ({"fc2_supercell": None}, {}, "found no fc2_supercell"),
        ({"fc3_supercell": "2x2x2"}, {}, "fc3_supercell: found 2x2x2, allowed: a regular 3x3 matrix of integers"),
        ({"fc3_supercell": np.diag([2, 2, 0])}, {}, "a regular 3x3 matrix of integers"),
        ({"fc3_supercell": np.diag([2, 2, 3])}, {}, "allowed: a multiple of the conventional cell"),
        ({"q_mesh": None}, {}, "found no q_point_mesh or q_mesh"),
        ({"q_mesh": [19, 19, 0]}, {}, "allowed: three positive integers"),
        ({}, {"srme": {"engines": ["fast"]}}, "config.srme.engines: found engine 'fast', allowed: default"),
        ({}, {"srme": {"temperature": 310}}, "config.srme.temperature: found 310, allowed"),
        ({}, {"protocol": {"conductivity": {"methods": ["lbte"]}}}, "rta among them"),
        ({}, {"srme": {"structures": "nowhere.xyz"}}, "config.srme.structures: nowhere.xyz: not found"),
    ],
)
def test_wrong_structures_and_settings(tmp_path: Path, info: Row, settings: Row, said: str) -> None:
    write(tmp_path / "s.extxyz", frame(SALT, **({"mp_id": "mp-1"} | info)))
    srme = {"structures": str(tmp_path / "s.extxyz")} | settings.get("srme", {})
    config = {"materials": [], "engine": EMT} | settings | {"srme": srme}
    with pytest.raises(ConfigError) as caught:
        Campaign.load(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_that_stands_twice(tmp_path: Path) -> None:
    write(tmp_path / "s.extxyz", [frame(SALT, mp_id="mp-1")] * 2)
    with pytest.raises(ConfigError, match=r"s.extxyz#1: found 'mp-1' twice"):
        structures.list_entries(str(tmp_path / "s.extxyz"))


def test_a_frame_that_is_no_crystal_is_left_to_the_table_of_structures(tmp_path: Path) -> None:
    slab = frame(SALT, mp_id="mp-1")
    slab.pbc = (True, True, False)
    write(tmp_path / "s.extxyz", [slab, frame(SALT, mp_id="mp-2")])
    entries = structures.list_entries(str(tmp_path / "s.extxyz"))
    changes = structures.protocol_changes(entries, 1e-5, lambda name: [name])
    assert list(changes["conductivity"]["q_mesh"]["meshes"]) == ["mp-2"]


def test_the_example_in_the_documentation() -> None:
    text = (ROOT / "docs/srme.md").read_text()
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert complete(config)["srme"]["temperature"] == 300
