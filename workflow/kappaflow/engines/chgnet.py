"""CHGNet: a universal potential whose weights come inside the package ``chgnet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.units import GPa

from kappaflow.engines.base import Engine, Evaluation

MODELS = ("0.3.0", "0.2.0", "r2scan")


class CHGNet(Engine):
    """``model`` is one of the versions inside the package."""

    package = "chgnet"
    known_kwargs = ()

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.model_name = settings["model"] or MODELS[0]
        self.atoms_per_second = {"cpu": 400.0, "cuda": 8000.0}
        if self.model_name not in MODELS:
            raise ValueError(f"engine.model: found {self.model_name!r}, allowed: {', '.join(MODELS)}")

    def weights(self) -> Path:
        import chgnet

        return next((Path(chgnet.__file__).parent / "pretrained" / self.model_name).glob("*.pth.tar"))

    @cached_property
    def _model(self) -> Any:
        from chgnet.model import CHGNet as Model

        return Model.load(model_name=self.model_name, use_device=self.device, verbose=False)

    def elements(self) -> set[str]:
        from ase.data import chemical_symbols

        return set(chemical_symbols[1:95])  # its embedding has 94 rows

    def evaluate(self, crystals: Sequence[Atoms]) -> list[Evaluation]:
        from pymatgen.io.ase import AseAtomsAdaptor

        graphs = [self._model.graph_converter(AseAtomsAdaptor.get_structure(crystal)) for crystal in crystals]
        outputs = self._model.predict_graph(graphs, task="efs", batch_size=len(graphs))
        outputs = [outputs] if isinstance(outputs, dict) else outputs  # one crystal comes back bare
        return [
            Evaluation(
                float(output["e"]) * (len(crystal) if self._model.is_intensive else 1),
                output["f"].astype(float),
                # The package divides by a volume that is negative in a left-handed cell.
                output["s"].astype(float) * GPa * crystal.cell.handedness,
            )
            for crystal, output in zip(crystals, outputs, strict=True)
        ]

    def atom_features(self, crystals: Sequence[Atoms]) -> list[dict[str, np.ndarray]]:
        """Features of the atoms before the last interaction layer ("layer") and the atomic "energy" (eV)."""
        from pymatgen.io.ase import AseAtomsAdaptor

        graphs = [self._model.graph_converter(AseAtomsAdaptor.get_structure(crystal)) for crystal in crystals]
        outputs = self._model.predict_graph(
            graphs, task="e", return_atom_feas=True, return_site_energies=True, batch_size=len(graphs)
        )
        outputs = [outputs] if isinstance(outputs, dict) else outputs  # one crystal comes back bare
        return [
            {"layer": output["atom_fea"].astype(float), "energy": output["site_energies"].astype(float).reshape(-1, 1)}
            for output in outputs
        ]
