"""Training of networks: one loop for all of them.

The loss is the absolute error of the standardised target plus the negative log-likelihood of a Laplace distribution,
which fits the scale alone (no gradient of it reaches the mean). AdamW with a one-cycle learning rate; the weights that
predict are an exponential moving average of those that are trained, from the epoch with the best validation error.
Members differ in their seeds. The standard deviation (aleatoric, and the spread of members) is multiplied by one factor
so that it is right on the validation side: a network fits its training side too well for the residuals there to tell.
Then every member is trained once more on both sides, for as many epochs as were best (``refit``).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kappaflow import progress
from kappaflow.surrogates import saving
from kappaflow.surrogates.base import Crystals, Model, Prediction
from kappaflow.surrogates.networks import graphs

SEEDS_APART = 1_000_003
"""Between the seeds of members, a prime, so that members of runs with neighbouring seeds are different ones."""
NONE = np.zeros(0)
LARGEST_GRADIENT = 5.0
"""Norm at which gradients are clipped."""


class Network(Model):
    """A surrogate that is one or several torch modules, trained together on a CPU or a GPU."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "batch_size": 32,
        "learning_rate": 3e-3,  # the largest of the cycle
        "weight_decay": 1e-2,
        "hidden": 64,
        "layers": 3,
        "dropout": 0.2,
        "patience": 10,  # epochs without a better validation error before training ends
        "averaging": 0.98,  # decay of the moving average of the weights, per step
        "members": 2,
        "refit": True,
        "max_atoms": None,  # train crystals with more atoms in the stored cell are left out
    }

    modules: list[nn.Module]
    _epochs: list[int]

    @abstractmethod
    def module(self) -> nn.Module:
        """A new module; it takes a batch and gives the mean and the logarithm of the scale, (size, 2)."""

    @abstractmethod
    def item(self, row: Mapping[str, Any]) -> Any:
        """What the module sees of a crystal."""

    @abstractmethod
    def batch(self, items: Sequence[Any]) -> Any:
        """Items together, with a method ``to(device)``."""

    def fit(self, train: Crystals, y: np.ndarray, validation: Crystals, y_validation: np.ndarray) -> None:
        """Train all members. Without validation crystals every epoch is trained and the scale stays as it was learned.

        Raises ValueError for targets that are not finite, where no train crystal is left, and where training diverges.
        """
        for side, values in (("train", y), ("validation", y_validation)):
            if not np.isfinite(values).all():
                raise ValueError(f"{side} targets: {np.sum(~np.isfinite(values))} are not finite; all must be")
        largest = self.options["max_atoms"]
        kept = [i for i, row in enumerate(train.rows) if largest is None or len(row["species_at_sites"]) <= largest]
        if not kept:
            raise ValueError(f"train crystals: none of {len(train)} left; max_atoms is {largest}")
        y = np.asarray(y, dtype=float)[kept]
        self._mean, self._width = float(y.mean()), float(y.std()) or 1.0
        self._factor, self._epochs, self.modules = 1.0, [], []
        progress.logger.info("graphs of %d crystals", len(kept) + len(validation))
        items = [self.item(train.rows[i]) for i in kept]
        held_out = [self.item(row) for row in validation.rows]
        standardised = torch.tensor((y - self._mean) / self._width, dtype=torch.float32)
        y_validation = np.asarray(y_validation, dtype=float)
        self._train_members(items, standardised, held_out, y_validation)
        if held_out:
            mean, std = self._predict(held_out)
            # of a Laplace distribution, the mean absolute error in units of std is 1 / sqrt(2)
            self._factor = max(float(np.mean(math.sqrt(2) * np.abs(y_validation - mean) / std)), 1e-3)
            if self.options["refit"]:
                self.held_out = mean
                both = torch.tensor((np.concatenate([y, y_validation]) - self._mean) / self._width, dtype=torch.float32)
                progress.logger.info("training once more, on both sides")
                lasting, self.modules, self._epochs = self._epochs, [], []
                self._train_members([*items, *held_out], both, lasting=lasting)

    def predict(self, crystals: Crystals) -> Prediction:
        """See `Model`; the standard deviation has the aleatoric part and the spread of members."""
        return self._predict([self.item(row) for row in crystals.rows])

    def save(self, folder: Path) -> None:
        """The weights of all members as safetensors, the rest as JSON."""
        arrays = {
            f"{member}.{name}": x.cpu().numpy()
            for member, module in enumerate(self.modules)
            for name, x in module.state_dict().items()
        }
        saving.write_arrays(folder / "weights.safetensors", arrays)
        learned = {"mean": self._mean, "width": self._width, "factor": self._factor, "epochs": self._epochs}
        saving.write_json(folder / "network.json", learned)

    def load(self, folder: Path) -> None:
        """See `Model`."""
        learned = saving.read_json(folder / "network.json")
        self._mean, self._width, self._factor = learned["mean"], learned["width"], learned["factor"]
        self._epochs = learned["epochs"]
        arrays = saving.read_arrays(folder / "weights.safetensors")
        self.modules = []
        for member in range(len(self._epochs)):
            module = self.module().to(_device())
            state = {
                name: torch.from_numpy(arrays[f"{member}.{name}"]).reshape(x.shape)
                for name, x in module.state_dict().items()
            }
            module.load_state_dict(state)
            self.modules.append(module.eval())

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Best epoch of each member, and the factor of the standard deviation."""
        return {"epochs": self._epochs, "std_factor": self._factor}

    def _train_members(
        self,
        items: Sequence[Any],
        y: Tensor,
        held_out: Sequence[Any] = (),
        y_validation: np.ndarray = NONE,
        lasting: Sequence[int] = (),
    ) -> None:
        lasting = lasting or [self.options["epochs"]] * self.options["members"]
        clock = progress.Progress("training", sum(lasting), "epochs")
        for member, last in enumerate(lasting):
            with _reproducible(self.setting.seed + SEEDS_APART * member, self.setting.threads):
                self._train(items, y, held_out, y_validation, last, clock)

    def _train(
        self,
        items: Sequence[Any],
        y: Tensor,
        held_out: Sequence[Any],
        y_validation: np.ndarray,
        last: int,
        clock: progress.Progress,
    ) -> None:
        """Train one member up to the epoch ``last``, on a schedule that ends with the option ``epochs``."""
        options, device = self.options, _device()
        module = self.module().to(device)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(options["averaging"]))
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=options["learning_rate"], weight_decay=options["weight_decay"]
        )
        batches = max(1, round(len(items) / options["batch_size"]))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options["learning_rate"], total_steps=batches * options["epochs"] + 1
        )
        shuffled = torch.Generator().manual_seed(torch.initial_seed())
        best, best_epoch, best_state = math.inf, last, None
        for epoch in range(1, last + 1):
            module.train()
            for chosen in torch.tensor_split(torch.randperm(len(items), generator=shuffled), batches):
                target = y[chosen].to(device)
                out = module(self.batch([items[i] for i in chosen.tolist()]).to(device))
                loss = laplace_loss(out, target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                average.update_parameters(module)
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"training diverged in epoch {epoch}: learning_rate is {options['learning_rate']}; lower it"
                )
            if held_out:
                mean, _ = self._outputs(average.module, held_out)
                error = float(np.abs(mean - y_validation).mean())
                if error < best:
                    best, best_epoch = error, epoch
                    best_state = {name: x.clone() for name, x in average.module.state_dict().items()}
            clock.step()
            if held_out and epoch - best_epoch >= options["patience"]:
                clock.skip(last - epoch)
                break
        if best_state is not None:
            average.module.load_state_dict(best_state)
            progress.logger.info("best validation error %.3f in epoch %d of %d", best, best_epoch, last)
        self.modules.append(average.module.eval())
        self._epochs.append(best_epoch)

    def _outputs(self, module: nn.Module, items: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale of the Laplace distribution of ln kappa, (n,) each."""
        module.eval()
        size, device = self.options["batch_size"], _device()
        with torch.no_grad():
            parts = [module(self.batch(items[i : i + size]).to(device)).cpu() for i in range(0, len(items), size)]
        out = torch.cat(parts).double().numpy() if parts else np.zeros((0, 2))
        return self._mean + self._width * out[:, 0], self._width * np.exp(out[:, 1])

    def _predict(self, items: Sequence[Any]) -> Prediction:
        with _reproducible(self.setting.seed, self.setting.threads):
            outputs = [self._outputs(module, items) for module in self.modules]
        means = np.array([mean for mean, _ in outputs])
        aleatoric = np.mean([2 * scale**2 for _, scale in outputs], axis=0)  # variance of a Laplace distribution
        return means.mean(axis=0), self._factor * np.sqrt(aleatoric + means.var(axis=0))


class GraphNetwork(Network):
    """A network of crystal graphs."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Network.defaults,
        "cutoff": 8.0,  # of bonds, angstrom
        "neighbours": 12,  # bonds of an atom, up to the end of the shell; None: all within the cutoff
    }

    def item(self, row: Mapping[str, Any]) -> graphs.Graph:
        """The graph of a crystal."""
        return graphs.of_row(row, self.options["cutoff"], self.options["neighbours"])

    def batch(self, items: Sequence[graphs.Graph]) -> graphs.Batch:
        """Several crystals as one graph."""
        return graphs.collate(items)


def laplace_loss(out: Tensor, target: Tensor) -> Tensor:
    """Absolute error of the mean, plus |r| / b + ln b, the negative log-likelihood of the scale b for residuals r."""
    residual = (out[:, 0] - target).abs()
    return (residual + residual.detach() * torch.exp(-out[:, 1]) + out[:, 1]).mean()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """Seed and threads of torch for a while, and algorithms that always give the same numbers."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
