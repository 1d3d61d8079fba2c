"""MEGNet (Chen et al., Chem. Mater. 31, 3564 (2019)): bonds, atoms and a global state update in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import GaussianSmearing

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout, perceptron
from kappaflow.surrogates.networks.training import GraphNetwork


class MEGNet(GraphNetwork):
    """Graph networks with a global state, which starts from properties of the crystal such as its number of atoms."""

    defaults: ClassVar[Mapping[str, Any]] = {**GraphNetwork.defaults, "gaussians": 40}

    def module(self) -> nn.Module:
        return Blocks(self.options)


class Blocks(nn.Module):
    """The module of `MEGNet`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = options["hidden"]
        self.elements = Elements(hidden)
        self.bonds = nn.Sequential(
            GaussianSmearing(0.0, options["cutoff"], options["gaussians"]), nn.Linear(options["gaussians"], hidden)
        )
        self.state = nn.Linear(len(graphs.STATE), hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(options["layers"]))
        self.readout = Readout(3 * hidden + len(graphs.STATE), hidden, options["dropout"])

    def forward(self, batch: graphs.Batch) -> Tensor:
        x, e, u = self.elements(batch.numbers), self.bonds(batch.lengths), self.state(batch.state)
        for block in self.blocks:
            x, e, u = block(batch, x, e, u)
        return self.readout(batch.pool(x), batch.pool(batch.gather(e)), u, batch.state)


class Block(nn.Module):
    """One update of bonds (e, d), atoms (a, d) and state (size, d).

    As torch_geometric.nn.MetaLayer, which has no place for the multiplicity of an atom in the means over a crystal. A
    linear map of concatenated features is the sum of maps of each: those of atoms and state are made once per atom.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.from_centre, self.from_neighbour, self.from_state = (nn.Linear(hidden, hidden) for _ in range(3))
        self.from_bond = nn.Linear(hidden, hidden)
        self.bond = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))
        self.atom = perceptron(3 * hidden, hidden, hidden)
        self.whole = perceptron(3 * hidden, hidden, hidden)

    def forward(self, batch: graphs.Batch, x: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nx, ne, nu = (norm(v) for norm, v in zip(self.norms, (x, e, u), strict=True))
        centre = self.from_centre(nx) + self.from_state(nu)[batch.crystal]
        message = self.bond(centre[batch.centres] + self.from_neighbour(nx)[batch.sources] + self.from_bond(ne))
        received = batch.gather(message)
        update = self.atom(torch.cat([nx, received, nu[batch.crystal]], dim=1))
        state = self.whole(torch.cat([batch.pool(update), batch.pool(received), nu], dim=1))
        return x + update, e + message, u + state
