"""The surrogates and feature sets that the config can name. Light: it is read at every Snakefile parse."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("baseline", "descriptors", "embeddings", "network", "ensemble", "physics")


RESERVED = ("model", "features", "family", "gpu")
"""Settings of a model that are no hyper-parameters."""

DESCRIPTORS = ("composition", "structure")

FEATURES: dict[str, dict[str, Any]] = {
    "composition": {"kind": "composition"},
    "structure": {"kind": "structure"},
    "soap": {"kind": "soap"},
    "topology": {"kind": "topology"},
    "sevennet": {
        "kind": "embeddings",
        "engine": {"name": "sevennet", "model": "7net-0"},
        "pooling": ["mean", "std", "min", "max"],
    },
    "chgnet": {"kind": "embeddings", "engine": {"name": "chgnet", "model": "0.3.0"}},
    "response": {"kind": "response"},
    "phonons": {"kind": "phonons"},
}
"""The feature sets that are there without the config; ``phonons`` are made from the tables of the workflow's own
stages."""

FEATURE_KINDS = ("composition", "structure", "soap", "topology", "embeddings", "response", "phonons")


@dataclass(frozen=True)
class Kind:
    """A kind of model: its family, where its class is, its feature sets, and whether its training wants a GPU."""

    family: str
    target: str
    features: tuple[str, ...] = ()
    network: bool = False


CONSTANTS = ("train_median", "boundary")
"""What every benchmark compares with, whether the config names it or not; the second where a split has a bound."""

_HERE = "kappaflow.surrogates"
KINDS: dict[str, Kind] = {
    "train_mean": Kind("baseline", f"{_HERE}.baselines:TrainMean"),
    "train_median": Kind("baseline", f"{_HERE}.baselines:TrainMedian"),
    "boundary": Kind("baseline", f"{_HERE}.baselines:Boundary"),
    "nearest_neighbour": Kind("baseline", f"{_HERE}.baselines:NearestNeighbour", DESCRIPTORS),
    "slack": Kind("baseline", f"{_HERE}.baselines:Slack"),
    "ridge": Kind("descriptors", f"{_HERE}.regressors:RidgeRegressor", DESCRIPTORS),
    "random_forest": Kind("descriptors", f"{_HERE}.regressors:Forest", DESCRIPTORS),
    "boosting": Kind("descriptors", f"{_HERE}.regressors:Boosting", DESCRIPTORS),
    "gaussian_process": Kind("descriptors", f"{_HERE}.regressors:GaussianProcess", DESCRIPTORS),
    "mlp": Kind("descriptors", f"{_HERE}.perceptron:Perceptron", DESCRIPTORS),
    "truncated": Kind("descriptors", f"{_HERE}.truncated:TruncatedRegression", DESCRIPTORS),
    "stack": Kind("ensemble", f"{_HERE}.stack:Stack", (*DESCRIPTORS, "sevennet", "chgnet"), network=True),
    "topology_cnn": Kind("descriptors", f"{_HERE}.topology_cnn:TopologyCNN", ("topology",), network=True),
    "cgcnn": Kind("network", f"{_HERE}.networks.cgcnn:CGCNN", network=True),
    "megnet": Kind("network", f"{_HERE}.networks.megnet:MEGNet", network=True),
    "alignn": Kind("network", f"{_HERE}.networks.alignn:ALIGNN", network=True),
    "equivariant": Kind("network", f"{_HERE}.networks.equivariant:Equivariant", network=True),
    "schnet": Kind("network", f"{_HERE}.networks.schnet:SchNet", network=True),
    "composition_transformer": Kind("network", f"{_HERE}.networks.composition:CompositionTransformer", network=True),
    "mlip_kappa": Kind("physics", f"{_HERE}.physics:MlipKappa", ("phonons",)),
    "delta": Kind("physics", f"{_HERE}.physics:Delta", ("phonons", *DESCRIPTORS)),
}


def kind(name: str, settings: Mapping[str, Any]) -> str:
    """The registered kind, or ``module:Class``, of a model of the config."""
    return settings.get("model", name)


def is_network(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a model's training wants a GPU."""
    target = kind(name, settings)
    return KINDS[target].network if target in KINDS else bool(settings.get("gpu", False))


def family(name: str, settings: Mapping[str, Any]) -> str:
    """The family of a model of the config; ``family`` in its settings overrules that of its kind."""
    if "family" in settings:
        return settings["family"]
    target = kind(name, settings)
    return KINDS[target].family if target in KINDS else "own"


def features(name: str, settings: Mapping[str, Any]) -> list[str]:
    """The feature sets that a model of the config takes."""
    target = kind(name, settings)
    default = KINDS[target].features if target in KINDS else ()
    return list(settings.get("features", default))


def feature_set(name: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Kind and options of a feature set, where ``settings`` are those of surrogates.features."""
    known = FEATURES.get(name, {"kind": name})
    return {**known, **settings.get(name, {})}


def load(target: str) -> Any:
    """The class that a registered kind or ``module:Class`` names. Raises ValueError where there is none."""
    path = KINDS[target].target if target in KINDS else target
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"surrogates: cannot load {target!r} ({error}); allowed: {', '.join(KINDS)} or module:Class"
        ) from None
