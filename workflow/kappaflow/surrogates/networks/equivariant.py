"""E(3)-equivariant network with e3nn, of the kind of NequIP (Batzner et al., Nat. Commun. 13, 2453 (2022))."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from e3nn import o3
from e3nn.math import soft_one_hot_linspace
from e3nn.nn import FullyConnectedNet, Gate
from torch import Tensor, nn

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout
from kappaflow.surrogates.networks.training import GraphNetwork

DEGREES = (0, 1, 2)
"""Of the features, each with the parity of the spherical harmonics."""
NEIGHBOURS = 26
"""Within 5 angstrom, mean of Phonix; it only sets the size of the features at the start."""


class Equivariant(GraphNetwork):
    """Tensor products of features up to l = 2 with the spherical harmonics of bonds; the last layer keeps scalars."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **GraphNetwork.defaults,
        "cutoff": 5.0,
        "neighbours": None,
        "layers": 2,  # the first makes vectors and tensors, the last uses them up
        "hidden": 64,  # scalars; half as many vectors, a quarter as many tensors
        "bessel": 8,
        "radial": 32,
    }

    def module(self) -> nn.Module:
        return TensorProducts(self.options)


class TensorProducts(nn.Module):
    """The module of `Equivariant`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden = options["hidden"]
        self.cutoff, self.bessel = options["cutoff"], options["bessel"]
        self.elements = Elements(hidden)
        irreps = [f"{hidden}x0e"]
        irreps += [f"{hidden}x0e + {hidden // 2}x1o + {hidden // 4}x2e"] * (options["layers"] - 1)
        irreps += [f"{hidden}x0e"]
        self.layers = nn.ModuleList(
            Convolution(o3.Irreps(a), o3.Irreps(b), options["bessel"], options["radial"]) for a, b in pairwise(irreps)
        )
        self.readout = Readout(hidden + len(graphs.STATE), hidden, options["dropout"])

    def forward(self, batch: graphs.Batch) -> Tensor:
        harmonics = o3.spherical_harmonics(list(DEGREES), batch.vectors, normalize=True, normalization="component")
        # vanishes smoothly at the cutoff
        radial = soft_one_hot_linspace(batch.lengths, 0.0, self.cutoff, self.bessel, basis="bessel", cutoff=True)
        radial = radial * self.bessel**0.5
        turns = {degree: wigner(batch.rotations, degree) for degree in DEGREES[1:]}
        x = self.elements(batch.numbers)
        for layer in self.layers:
            x = layer(batch, x, harmonics, radial, turns)
        return self.readout(batch.pool(x), batch.state)


class Convolution(nn.Module):
    """Messages from neighbours, weighted by a network of the bond length, then a gate; a residual where it fits."""

    def __init__(self, inside: o3.Irreps, outside: o3.Irreps, bessel: int, radial: int) -> None:
        super().__init__()
        harmonics = o3.Irreps([(1, (degree, (-1) ** degree)) for degree in DEGREES])
        scalars = o3.Irreps([(mul, ir) for mul, ir in outside if ir.l == 0])
        gated = o3.Irreps([(mul, ir) for mul, ir in outside if ir.l > 0])
        gates = o3.Irreps([(gated.num_irreps, "0e")] if gated else [])
        silu, sigmoid = nn.functional.silu, torch.sigmoid
        self.gate = Gate(scalars, [silu], gates, [sigmoid] if gated else [], gated)
        paths: list[tuple[int, o3.Irrep]] = []
        instructions = []
        for i, (mul, ir) in enumerate(inside):
            for j, (_, harmonic) in enumerate(harmonics):
                for out in ir * harmonic:
                    if out in outside:
                        instructions.append((i, j, len(paths), "uvu", True))
                        paths.append((mul, out))
        messages, places, _ = o3.Irreps(paths).sort()
        instructions = [(i, j, places[k], mode, train) for i, j, k, mode, train in instructions]
        self.inside = inside
        self.before = o3.Linear(inside, inside)
        self.product = o3.TensorProduct(
            inside, harmonics, messages, instructions, internal_weights=False, shared_weights=False
        )
        self.weights = FullyConnectedNet([bessel, radial, self.product.weight_numel], silu)
        self.after = o3.Linear(messages.simplify(), self.gate.irreps_in)
        self.own = o3.Linear(inside, self.gate.irreps_in)
        self.residual = inside == outside

    def forward(
        self, batch: graphs.Batch, x: Tensor, harmonics: Tensor, radial: Tensor, turns: Mapping[int, Tensor]
    ) -> Tensor:
        sent = turned(self.before(x)[batch.orbits], self.inside, turns)[batch.neighbours]
        messages = self.product(sent, harmonics, self.weights(radial))
        # a sum, so that the prediction is smooth where a neighbour crosses the cutoff
        received = x.new_zeros(len(x), messages.shape[1]).index_add_(0, batch.centres, messages) / NEIGHBOURS**0.5
        update = self.gate(self.after(received) + self.own(x))
        return x + update if self.residual else update


def turned(x: Tensor, irreps: o3.Irreps, turns: Mapping[int, Tensor]) -> Tensor:
    """Features (n, d) of representatives, turned to those of the n atoms."""
    parts = []
    for (mul, ir), block in zip(irreps, irreps.slices(), strict=True):
        part = x[:, block]
        if ir.l > 0:
            part = torch.bmm(part.reshape(-1, mul, ir.dim), turns[ir.l].transpose(1, 2)).reshape(len(x), -1)
        parts.append(part)
    return torch.cat(parts, dim=1)


def wigner(rotations: Tensor, degree: int) -> Tensor:
    """Matrices D (n, 2 l + 1, 2 l + 1) with Y(R r) = D Y(r) for orthogonal matrices R (n, 3, 3), also improper.

    Solved from the harmonics of a few fixed directions, which needs no angles.
    """
    points = _directions(rotations)
    basis = o3.spherical_harmonics(degree, points, normalize=True)
    moved = o3.spherical_harmonics(degree, points @ rotations.transpose(1, 2), normalize=True)
    return (torch.linalg.pinv(basis) @ moved).transpose(1, 2)


def _directions(like: Tensor) -> Tensor:
    """Nine directions in general position, (9, 3)."""
    i = torch.arange(9, dtype=like.dtype, device=like.device)
    z = (2 * i + 1) / 9 - 1
    turn = 2.4 * i  # the golden angle, about
    flat = torch.sqrt(1 - z**2)
    return torch.stack([flat * torch.cos(turn), flat * torch.sin(turn), z], dim=1)
