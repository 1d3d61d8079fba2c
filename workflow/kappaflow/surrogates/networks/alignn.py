"""Atomistic line graph network (Choudhary and DeCost, npj Comput. Mater. 7, 185 (2021))."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import GaussianSmearing

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout
from kappaflow.surrogates.networks.training import GraphNetwork

ENOUGH = 1e-6
"""Added to a sum of gates that may vanish."""


class ALIGNN(GraphNetwork):
    """Edge-gated convolutions in turn on the line graph (bonds that share an atom, by their angle) and on the graph."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **GraphNetwork.defaults,
        "neighbours": 8,
        "layers": 2,
        "plain_layers": 2,  # on the graph alone, after the others
        "gaussians": 40,
        "angle_gaussians": 20,
    }

    def module(self) -> nn.Module:
        return LineGraphs(self.options)


class LineGraphs(nn.Module):
    """The module of `ALIGNN`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = options["hidden"]
        self.elements = Elements(hidden)
        self.bonds = nn.Sequential(
            GaussianSmearing(0.0, options["cutoff"], options["gaussians"]), nn.Linear(options["gaussians"], hidden)
        )
        self.angles = nn.Sequential(
            GaussianSmearing(-1.0, 1.0, options["angle_gaussians"]), nn.Linear(options["angle_gaussians"], hidden)
        )
        self.on_lines = nn.ModuleList(EdgeGated(hidden) for _ in range(options["layers"]))
        self.on_graph = nn.ModuleList(EdgeGated(hidden) for _ in range(options["layers"] + options["plain_layers"]))
        self.readout = Readout(hidden + len(graphs.STATE), hidden, options["dropout"])

    def forward(self, batch: graphs.Batch) -> Tensor:
        bond, other = bond_pairs(batch.centres)
        directions = nn.functional.normalize(batch.vectors, dim=1)
        x, e = self.elements(batch.numbers), self.bonds(batch.lengths)
        a = self.angles((directions[bond] * directions[other]).sum(dim=1))
        for i, convolution in enumerate(self.on_graph):
            if i < len(self.on_lines):
                e, a = self.on_lines[i](e, a, other, bond)
            x, e = convolution(x, e, batch.sources, batch.centres)
        return self.readout(batch.pool(x), batch.state)


class EdgeGated(nn.Module):
    """Edge-gated graph convolution (Dwivedi et al., J. Mach. Learn. Res. 24, 43 (2023)), with layer norms.

    It updates nodes (m, d) and edges (k, d), where edge i brings node ``source[i]`` to ``target[i]``.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.from_source, self.from_target, self.from_edge = (nn.Linear(hidden, hidden) for _ in range(3))
        self.own, self.sent = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.norm_nodes, self.norm_edges = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor, e: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        m = self.from_source(x)[source] + self.from_target(x)[target] + self.from_edge(e)
        gate = torch.sigmoid(m)
        zero = torch.zeros_like(x)
        received = zero.index_add(0, target, gate * self.sent(x)[source])
        received = received / (zero.index_add(0, target, gate) + ENOUGH)
        x = x + nn.functional.silu(self.norm_nodes(self.own(x) + received))
        return x, e + nn.functional.silu(self.norm_edges(m))


def bond_pairs(centres: Tensor) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different bonds with the same centre, for bonds sorted by centre."""
    _, counts = torch.unique_consecutive(centres, return_counts=True)
    per_bond = torch.repeat_interleave(counts, counts)
    first = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    bond = torch.repeat_interleave(torch.arange(len(centres), device=centres.device), per_bond)
    start = torch.cumsum(per_bond, 0) - per_bond
    other = first[bond] + torch.arange(len(bond), device=centres.device) - start[bond]
    different = bond != other
    return bond[different], other[different]
