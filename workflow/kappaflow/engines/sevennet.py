"""SevenNet: equivariant potentials whose weights come inside the package ``sevenn``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from kappaflow.engines.base import Engine, Evaluation

MOST_DISPLACED = 0.5
"""Largest displacement in angstrom up to which crystals share one search for neighbours."""


class SevenNet(Engine):
    """``model`` is a name that the package knows, or a checkpoint file; ``kwargs.modal`` picks the fidelity."""

    package = "sevenn"
    known_kwargs = ("modal",)
    fc3_method = "random"
    """The models have no parity; what breaks inversion cancels in pairs (docs/random-displacements.md)."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.model_name = settings["model"] or "7net-l3i5"
        self._settings = settings
        self._double = False
        slow = "l3i5" in self.model_name
        self.atoms_per_second = {"cpu": 70.0, "cuda": 3000.0} if slow else {"cpu": 200.0, "cuda": 9000.0}

    def weights(self) -> Path:
        from sevenn.util import pretrained_name_to_path

        if Path(self.model_name).is_file():
            return Path(self.model_name)
        try:
            return Path(pretrained_name_to_path(self.model_name))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"engine.model: found {self.model_name!r}, allowed: 7net-l3i5, 7net-0 or a checkpoint file ({error})"
            ) from error

    @cached_property
    def _checkpoint(self) -> Any:
        from sevenn.util import load_checkpoint

        return load_checkpoint(self.weights())

    @cached_property
    def _model(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self._checkpoint.build_model()
        model.set_is_batch_data(True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if self._double:
            model.double()
            for module in model.children():
                module.register_forward_hook(_in_float64)
        return model.to(self.device).eval()

    def in_float64(self) -> SevenNet:
        """The same weights, with everything that follows from them and the positions in float64; for comparisons."""
        engine = SevenNet(self._settings)
        engine._double = True
        return engine

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | ({"precision": "float64"} if self._double else {})

    def elements(self) -> set[str]:
        from ase.data import chemical_symbols

        return {chemical_symbols[number] for number in self._checkpoint.config["_type_map"]}

    def _batch(self, crystals: Sequence[Atoms]) -> Any:
        from torch_geometric.data import Batch

        if len(crystals) > 1 and (largest := _displacement(crystals)) <= MOST_DISPLACED:
            return self._displaced_batch(crystals, largest).to(self.device)
        return Batch.from_data_list([self._graph(crystal) for crystal in crystals]).to(self.device)

    def _graph(self, crystal: Atoms) -> Any:
        import sevenn._keys as key
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from sevenn.util import dtype_correct

        plain = unlabeled_atoms_to_graph(crystal, self._model.cutoff)
        graph = AtomGraphData(**{name: dtype_correct(value, self._dtype) for name, value in plain.items()})
        if "modal" in self.kwargs:
            graph[key.DATA_MODALITY] = self.kwargs["modal"]
        return graph

    def _displaced_batch(self, crystals: Sequence[Atoms], largest: float) -> Any:
        """The batch of ``_graph`` for crystals that differ in displacements of at most ``largest`` (angstrom) from the
        first: neighbours are searched once, for that one, as far as any pair can come into reach."""
        import sevenn._keys as key
        import torch
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph

        first, count, atoms = crystals[0], len(crystals), len(crystals[0])
        cutoff, reach = self._model.cutoff, 2 * largest + 1e-6
        plain = unlabeled_atoms_to_graph(first, cutoff + reach)
        pairs, vectors = (torch.as_tensor(plain[name], device=self.device) for name in (key.EDGE_IDX, key.EDGE_VEC))
        positions = torch.as_tensor(np.array([crystal.positions for crystal in crystals]), device=self.device)
        moves = positions - positions[0]
        vectors = vectors + moves[:, pairs[1]] - moves[:, pairs[0]]  # (crystals, pairs, 3)
        crystal, pair = torch.nonzero(vectors.norm(dim=2) < cutoff, as_tuple=True)
        numbers = torch.as_tensor(first.numbers, dtype=torch.int64, device=self.device).repeat(count)
        data: dict[str, Any] = {
            key.NODE_FEATURE: numbers,
            key.ATOMIC_NUMBERS: numbers,
            key.POS: positions.reshape(-1, 3).to(self._dtype),
            key.EDGE_IDX: pairs[:, pair] + atoms * crystal,
            key.EDGE_VEC: vectors[crystal, pair].to(self._dtype),
            key.CELL_VOLUME: torch.full((count,), first.cell.volume, dtype=self._dtype),
            key.NUM_ATOMS: torch.full((count,), atoms),
            key.BATCH: torch.arange(count).repeat_interleave(atoms),
            key.INFO: [{}] * count,
        }
        graph = AtomGraphData(**data)
        if "modal" in self.kwargs:
            graph[key.DATA_MODALITY] = [self.kwargs["modal"]] * count
        return graph

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.float64 if self._double else torch.float32

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        import sevenn._keys as key
        import torch

        output = self._model(self._batch(crystals))
        energies = output[key.PRED_TOTAL_ENERGY].detach().cpu().double().numpy().reshape(-1)
        forces = output[key.PRED_FORCE].detach().cpu().double().numpy()
        # Order xx yy zz xy yz zx, positive for compression: the opposite sign of ASE.
        stresses = -output[key.PRED_STRESS].detach().cpu().double().numpy().reshape(-1, 6)
        if self.device == "cuda":
            torch.cuda.synchronize()
        ends = np.cumsum([len(crystal) for crystal in crystals])[:-1]
        return [
            Evaluation(float(energy), force, stress[[0, 3, 5, 3, 1, 4, 5, 4, 2]].reshape(3, 3))
            for energy, force, stress in zip(energies, np.split(forces, ends), stresses, strict=True)
        ]

    def atom_features(self, crystals: Sequence[Atoms]) -> list[dict[str, np.ndarray]]:
        """Node features after each interaction layer ("layer0", ...) and the atomic "energy" (eV).

        Of a layer: its scalars, then the norms of its vectors and higher tensors, which do not change under rotation.
        """
        import sevenn._keys as key
        import torch

        layers: dict[str, np.ndarray] = {}
        with torch.no_grad():
            data = self._model._preprocess(self._batch(crystals))
            for name, module in self._model.named_children():
                if name == "force_output":
                    break
                data = module(data)
                if name.endswith("_equivariant_gate"):
                    x, irreps = data[key.NODE_FEATURE], module.gate.irreps_out
                    parts = [
                        x[:, part] if ir.l == 0 else x[:, part].reshape(len(x), mul, ir.dim).norm(dim=2)
                        for part, (mul, ir) in zip(irreps.slices(), irreps, strict=True)
                    ]
                    layers[f"layer{len(layers)}"] = torch.cat(parts, dim=1).cpu().double().numpy()
            layers["energy"] = data[key.ATOMIC_ENERGY].reshape(-1, 1).cpu().double().numpy()
        ends = np.cumsum([len(crystal) for crystal in crystals])[:-1]
        split = {name: np.split(x, ends) for name, x in layers.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(crystals))]


def _in_float64(module: Any, arguments: Any, data: Any) -> Any:
    """The package makes its one-hot vectors in float32 whatever the model is."""
    for name, value in list(data.items()):
        if hasattr(value, "is_floating_point") and value.is_floating_point():
            data[name] = value.double()
    return data


def _displacement(crystals: Sequence[Atoms]) -> float:
    """Largest displacement from the first crystal in angstrom; infinite where cell, boundaries or atoms differ."""
    first = crystals[0]
    for other in crystals[1:]:
        if (
            len(other) != len(first)
            or (other.numbers != first.numbers).any()
            or (other.pbc != first.pbc).any()
            or (other.cell[:] != first.cell[:]).any()
        ):
            return float("inf")
    moves = np.array([crystal.positions for crystal in crystals]) - first.positions
    return float(np.sqrt(np.square(moves).sum(axis=2).max()))
