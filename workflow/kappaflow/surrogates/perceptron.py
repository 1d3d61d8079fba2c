"""A small fully connected network on feature sets."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kappaflow.surrogates.base import Prediction
from kappaflow.surrogates.regressors import Fit, Regressor
from kappaflow.surrogates.saving import read_arrays, write_arrays


class Perceptron(Regressor):
    """A small fully connected network in torch: an ensemble of ``members`` with dropout, stopped early on
    validation."""

    defaults = {
        "hidden": 256,
        "layers": 2,
        "dropout": [0.1, 0.4],
        "learning_rate": 2e-3,
        "weight_decay": 1e-2,
        "batch_size": 64,
        "epochs": 120,
        "patience": 25,
        "members": 3,
        "refit": True,
    }
    searched = ("dropout",)

    def _fitted(
        self, x: np.ndarray, y: np.ndarray, x_validation: np.ndarray, y_validation: np.ndarray, values: dict[str, Any]
    ) -> Fit:
        torch.set_num_threads(self.setting.threads)
        self.shift = {"centre": float(y.mean()), "spread": float(y.std()) or 1.0}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        inputs, targets = _tensor(x, device), _tensor((y - self.shift["centre"]) / self.shift["spread"], device)
        members, lasting = [], list(values.get("member_epochs") or [])
        for member in range(values["members"]):
            torch.manual_seed(1000 * self.setting.seed + member)
            network = _perceptron(x.shape[1], values).to(device)
            optimiser = torch.optim.AdamW(
                network.parameters(), lr=values["learning_rate"], weight_decay=values["weight_decay"]
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, values["epochs"])
            best, kept, waited, last = np.inf, copy.deepcopy(network.state_dict()), 0, 0
            # A refit ends where the validation error was smallest, on the same schedule.
            for epoch in range(lasting[member] if lasting and not len(y_validation) else values["epochs"]):
                network.train()
                for batch in torch.randperm(len(y)).split(values["batch_size"]):
                    if len(batch) < 2 and len(y) > 1:
                        continue
                    optimiser.zero_grad()
                    loss = torch.nn.functional.l1_loss(network(inputs[batch]).squeeze(1), targets[batch])
                    loss.backward()
                    optimiser.step()
                schedule.step()
                if not len(y_validation):
                    kept = network.state_dict()
                    continue
                predicted = self._forward(network, x_validation)
                error, waited = float(np.abs(predicted - y_validation).mean()), waited + 1
                if error < best:
                    best, kept, waited, last = error, copy.deepcopy(network.state_dict()), 0, epoch + 1
                if waited >= values["patience"]:
                    break
            network.load_state_dict(kept)
            members.append(network.eval())
            if len(y_validation):
                lasting.append(last)
        return members, {**values, "member_epochs": lasting, "inputs": x.shape[1], **self.shift}

    def _forward(self, network: Any, x: np.ndarray) -> np.ndarray:
        network.eval()
        with torch.no_grad():
            scaled = network(_tensor(x, next(network.parameters()).device)).squeeze(1).cpu().double().numpy()
        return scaled * self.shift["spread"] + self.shift["centre"]

    def _predicted(self, estimator: Any, x: np.ndarray) -> Prediction:
        members = np.array([self._forward(network, x) for network in estimator])
        return members.mean(axis=0), members.std(axis=0)

    def _also_chosen(self) -> dict[str, Any]:
        return {"member_epochs": self.values["member_epochs"]}

    def _write(self, estimator: Any, folder: Path) -> None:
        for number, network in enumerate(estimator):
            weights = {name: value.cpu().numpy() for name, value in network.state_dict().items()}
            write_arrays(folder / f"member-{number}.safetensors", weights)

    def _read(self, folder: Path) -> Any:
        self.shift = {key: self.values[key] for key in ("centre", "spread")}
        members = []
        for number in range(self.values["members"]):
            network = _perceptron(self.values["inputs"], self.values)
            arrays = read_arrays(folder / f"member-{number}.safetensors")
            network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
            members.append(network.eval())
        return members


def _tensor(values: np.ndarray, device: Any) -> Any:
    return torch.as_tensor(values, dtype=torch.float32, device=device)


def _perceptron(inputs: int, values: Mapping[str, Any]) -> Any:
    widths = [inputs, *[values["hidden"]] * values["layers"]]
    layers: list[Any] = [nn.Dropout(values["dropout"] / 2)]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU(), nn.Dropout(values["dropout"])]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
