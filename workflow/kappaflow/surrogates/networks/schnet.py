"""SchNet (Schuett et al., J. Chem. Phys. 148, 241722 (2018)), interaction blocks of PyG on the periodic graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import GaussianSmearing, InteractionBlock

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout
from kappaflow.surrogates.networks.training import GraphNetwork


class SchNet(GraphNetwork):
    """Continuous-filter convolutions over all neighbours within a smooth cutoff."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **GraphNetwork.defaults,
        "cutoff": 5.0,
        "neighbours": None,
        "gaussians": 40,
    }

    def module(self) -> nn.Module:
        return Interactions(self.options)


class Interactions(nn.Module):
    """The module of `SchNet`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, gaussians, cutoff = options["hidden"], options["gaussians"], options["cutoff"]
        self.elements = Elements(hidden)
        self.basis = GaussianSmearing(0.0, cutoff, gaussians)
        self.blocks = nn.ModuleList(
            InteractionBlock(hidden, gaussians, hidden, cutoff) for _ in range(options["layers"])
        )
        self.readout = Readout(hidden + len(graphs.STATE), hidden, options["dropout"])

    def forward(self, batch: graphs.Batch) -> Tensor:
        x, bonds = self.elements(batch.numbers), torch.stack([batch.sources, batch.centres])
        lengths = batch.lengths
        attributes = self.basis(lengths)
        for block in self.blocks:
            x = x + block(x, bonds, lengths, attributes)
        return self.readout(batch.pool(x), batch.state)
