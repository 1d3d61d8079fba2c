"""Crystal graph convolutional network (Xie and Grossman, Phys. Rev. Lett. 120, 145301 (2018)), convolutions of PyG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn import CGConv
from torch_geometric.nn.models.schnet import GaussianSmearing

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout
from kappaflow.surrogates.networks.training import GraphNetwork


class CGCNN(GraphNetwork):
    """Gated convolutions over the nearest neighbours. A mean, not a sum, as whole shells differ in number."""

    defaults: ClassVar[Mapping[str, Any]] = {**GraphNetwork.defaults, "gaussians": 40}

    def module(self) -> nn.Module:
        return Convolutions(self.options)


class Convolutions(nn.Module):
    """The module of `CGCNN`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, gaussians = options["hidden"], options["gaussians"]
        self.elements = Elements(hidden)
        self.basis = GaussianSmearing(0.0, options["cutoff"], gaussians)
        self.convolutions = nn.ModuleList(CGConv(hidden, gaussians, aggr="mean") for _ in range(options["layers"]))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(options["layers"]))
        self.readout = Readout(hidden + len(graphs.STATE), hidden, options["dropout"])

    def forward(self, batch: graphs.Batch) -> Tensor:
        x, bonds = self.elements(batch.numbers), torch.stack([batch.sources, batch.centres])
        attributes = self.basis(batch.lengths)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x, bonds, attributes))
        return self.readout(batch.pool(x), batch.state)
