"""Settings of the physics: presets, hashes, round trips."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from kappaflow.config import ConfigError, check, load_schema
from kappaflow.dataset.tables import Row
from kappaflow.phonons.conductivity import q_mesh
from kappaflow.phonons.displacements import supercell_matrix
from kappaflow.protocol import PRESETS, Conductivity, Displacements, Nac, Protocol, digest

SECTION = load_schema()["properties"]["protocol"]
BY_NAME = ("matrices", "meshes")


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in BY_NAME:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def schema_leaves(schema: dict[str, Any], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for key, part in schema.get("properties", {}).items():
        found |= schema_leaves(part, (*path, key)) or {(*path, key)}
    return found


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case None:
            return 3.0
        case str():
            return {"symfc": "traditional", "none": "dfpt", "diagonal": "near_cubic", "systematic": "random"}[value]
        case list():
            return value[:-1] or ([value[0] + 1] if value and isinstance(value[0], float) else ["lbte"])
        case dict():
            return {**value, "cubic": [3, 3, 3]}
        case _:
            raise TypeError(value)


def reversed_keys(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: reversed_keys(values[key]) for key in reversed(values)}
    return values


@pytest.fixture(params=PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


def test_preset_is_allowed_and_sets_every_key(preset: str) -> None:
    check(PRESETS[preset], SECTION, "config.protocol")
    assert {path for path, _ in leaves(PRESETS[preset])} == schema_leaves(SECTION) - {("preset",)}
    assert set(SECTION["properties"]["preset"]["enum"]) == set(PRESETS)


def test_round_trip(preset: str) -> None:
    protocol = Protocol.from_config({"preset": preset})
    plain = json.loads(json.dumps(protocol.as_dict()))
    assert plain == PRESETS[preset]
    assert Protocol.from_dict(plain) == protocol
    assert Protocol.from_dict(plain).hash == protocol.hash
    # As the sections reach the rules.
    assert Displacements.from_dict(plain["displacements"]) == protocol.displacements
    assert Conductivity.from_dict(plain["conductivity"]) == protocol.conductivity


def test_hash_names_the_values_and_not_their_order(preset: str) -> None:
    values = PRESETS[preset]
    original = Protocol.from_dict(values).hash
    assert len(original) == 16
    int(original, 16)
    assert Protocol.from_dict(reversed_keys(values)).hash == original
    hashes = {original}
    for path, value in leaves(values):
        changed = copy.deepcopy(values)
        part = changed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = another(value)
        hashes.add(Protocol.from_dict(changed).hash)
    assert len(hashes) == 1 + len(list(leaves(values)))


def test_presets_have_different_hashes() -> None:
    assert len({Protocol.from_config({"preset": name}).hash for name in PRESETS}) == len(PRESETS)


def test_the_users_keys_replace_the_presets() -> None:
    before = copy.deepcopy(PRESETS)
    protocol = Protocol.from_config(
        {
            "preset": "standard",
            "displacements": {"distance": 0.01, "fc3_supercell": {"matrices": {"NaCl": [3, 3, 3]}}},
            "conductivity": {"temperatures": [300.0]},
        }
    )
    assert protocol.displacements.distance == 0.01
    assert protocol.displacements.fc3_supercell.matrices["NaCl"] == [3, 3, 3]
    assert protocol.displacements.fc3_supercell.matrices["cubic"] == [2, 2, 2]
    assert protocol.conductivity.temperatures == [300.0]
    assert protocol.conductivity.methods == PRESETS["standard"]["conductivity"]["methods"]
    assert before == PRESETS


def test_the_non_analytical_term_is_left_out_unless_it_is_asked_for(preset: str) -> None:
    without, with_it = (
        Protocol.from_config({"preset": preset, **nac}) for nac in ({}, {"nac": yaml.safe_load("method: dfpt")})
    )
    assert (without.nac, with_it.nac) == (Nac("none"), Nac("dfpt"))
    assert without.hash != with_it.hash
    # YAML reads `none` as a word; it is no null.
    assert Protocol.from_config({"preset": preset, "nac": yaml.safe_load("method: none")}) == without
    allowed = "one of none, dfpt, born"
    with pytest.raises(ConfigError, match=rf"^config\.protocol\.nac\.method: found 'wang', allowed: {allowed}$"):
        check({"nac": {"method": "wang"}}, SECTION, "config.protocol")


def test_nobody_changes_a_protocol() -> None:
    protocol = Protocol.from_config({"preset": "quick"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.relax.fmax = 1.0  # type: ignore[misc]


def test_standard_preset_is_that_of_the_benchmark(prototype: Callable[..., Row]) -> None:
    """Cells and meshes of Togo, Chaput, Tanaka 2015 (kappa-103), for the largest of its conventional cells too."""
    protocol = Protocol.from_config({"preset": "standard"})
    rules = protocol.displacements.fc2_supercell, protocol.displacements.fc3_supercell
    for crystal in (
        prototype("rocksalt", "Na Cl", a=5.64),
        prototype("zincblende", "Zn S", a=5.41),
        prototype("diamond", "C", a=3.567),
    ):
        assert [supercell_matrix(crystal, rule) for rule in rules] == [[4, 4, 4], [2, 2, 2]]
        assert q_mesh(crystal, protocol.conductivity.q_mesh) == [19, 19, 19]
    wurtzite = prototype("wurtzite", "Zn O", a=3.25, c=5.2, u=0.382)
    assert [supercell_matrix(wurtzite, rule) for rule in rules] == [[5, 5, 3], [3, 3, 2]]
    assert q_mesh(wurtzite, protocol.conductivity.q_mesh) == [19, 19, 10]
    assert protocol.displacements.fc3_pair_cutoff is None
    assert protocol.displacements.distance == 0.03
    assert protocol.conductivity.isotopes


def test_digest_tells_parts_apart() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest("a", "b"), digest("ab"), digest(["a", "b"]), digest("b", "a"), digest("a", None)}) == 5
