"""The surrogates and feature sets that the config can name. Light: it is read at every Snakefile parse."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("baseline", "descriptors", "embeddings", "network", "physics")


@dataclass(frozen=True)
class Kind:
    """A kind of model: its family, where its class is, and whether its training wants a GPU."""

    family: str
    target: str
    network: bool = False


KINDS: dict[str, Kind] = {
    "train_mean": Kind("baseline", "kappaflow.surrogates.baselines:TrainMean"),
    "train_median": Kind("baseline", "kappaflow.surrogates.baselines:TrainMedian"),
    "boundary": Kind("baseline", "kappaflow.surrogates.baselines:Boundary"),
    "nearest_neighbour": Kind("baseline", "kappaflow.surrogates.baselines:NearestNeighbour"),
    "slack": Kind("baseline", "kappaflow.surrogates.baselines:Slack"),
    "ridge": Kind("descriptors", "kappaflow.surrogates.regressors:RidgeRegressor"),
    "random_forest": Kind("descriptors", "kappaflow.surrogates.regressors:Forest"),
    "boosting": Kind("descriptors", "kappaflow.surrogates.regressors:Boosting"),
    "gaussian_process": Kind("descriptors", "kappaflow.surrogates.regressors:GaussianProcess"),
    "mlp": Kind("descriptors", "kappaflow.surrogates.regressors:Perceptron"),
    "truncated": Kind("descriptors", "kappaflow.surrogates.truncated:TruncatedRegression"),
    "stack": Kind("descriptors", "kappaflow.surrogates.stack:Stack"),
    "topology_cnn": Kind("descriptors", "kappaflow.surrogates.topology_cnn:TopologyCNN", network=True),
    "cgcnn": Kind("network", "kappaflow.surrogates.networks.cgcnn:CGCNN", network=True),
    "megnet": Kind("network", "kappaflow.surrogates.networks.megnet:MEGNet", network=True),
    "alignn": Kind("network", "kappaflow.surrogates.networks.alignn:ALIGNN", network=True),
    "equivariant": Kind("network", "kappaflow.surrogates.networks.equivariant:Equivariant", network=True),
    "schnet": Kind("network", "kappaflow.surrogates.networks.schnet:SchNet", network=True),
    "composition_transformer": Kind("network", "kappaflow.surrogates.networks.composition:CompositionTransformer", network=True),
    "mlip_kappa": Kind("physics", "kappaflow.surrogates.physics:MlipKappa"),
    "delta": Kind("physics", "kappaflow.surrogates.physics:Delta"),
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


def load(target: str) -> Any:
    """The class that a registered kind or ``module:Class`` names. Raises ValueError where there is none."""
    path = KINDS[target].target if target in KINDS else target
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"surrogates: cannot load {target!r} ({error}); allowed: {', '.join(KINDS)} or module:Class") from None
