"""A transformer of compositions, as CrabNet (Wang et al., npj Comput. Mater. 7, 77 (2021)): it sees no structure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from kappaflow.surrogates.networks import graphs
from kappaflow.surrogates.networks.layers import Elements, Readout
from kappaflow.surrogates.networks.training import Network

RESOLUTION = 1000.0
"""Wave numbers of the encoding of fractions end here, that is at differences of 0.1 %."""


@dataclass(frozen=True)
class Compositions:
    """A batch of m compositions."""

    numbers: Tensor  # (m, elements) atomic numbers, zero beyond the elements of a composition
    fractions: Tensor  # (m, elements) shares of the atoms
    state: Tensor  # (m, 2) about zero mean and unit variance: atoms of the reduced formula (logarithm), elements

    def to(self, device: str) -> Compositions:
        """The same on a device."""
        return Compositions(self.numbers.to(device), self.fractions.to(device), self.state.to(device))


class CompositionTransformer(Network):
    """Self-attention between the elements, which are encoded with their fractions; mean over atoms at the end."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Network.defaults,
        "epochs": 40,
        "patience": 15,
        "learning_rate": 1e-3,
        "dropout": 0.1,
        "members": 3,
        "heads": 4,
    }

    def module(self) -> nn.Module:
        return Attention(self.options)

    def item(self, row: Mapping[str, Any]) -> dict[int, int]:
        """The reduced formula: numbers of atoms by atomic number."""
        counts = Counter(atomic_numbers[s] for s in row["species_at_sites"])
        if max(counts) > graphs.HEAVIEST:
            raise ValueError(
                f"species_at_sites: element {max(counts)} found; networks know elements up to {graphs.HEAVIEST}"
            )
        divisor = math.gcd(*counts.values())
        return {z: counts[z] // divisor for z in sorted(counts)}

    def batch(self, items: Sequence[dict[int, int]]) -> Compositions:
        """Compositions side by side."""
        width, atoms = max(map(len, items)), [sum(item.values()) for item in items]
        numbers = torch.tensor([[*item, *[0] * (width - len(item))] for item in items])
        amounts = torch.tensor([[*item.values(), *[0] * (width - len(item))] for item in items])
        state = torch.tensor([[math.log(n) - 2.0, len(item) - 3.0] for item, n in zip(items, atoms, strict=True)])
        return Compositions(numbers, amounts / torch.tensor(atoms)[:, None], state)


class Attention(nn.Module):
    """The module of `CompositionTransformer`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, dropout = options["hidden"], options["dropout"]
        self.elements = Elements(hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, options["heads"], 2 * hidden, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, options["layers"], nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.fractions = nn.Linear(hidden, hidden)
        self.readout = Readout(hidden + 2, hidden, dropout)

    def forward(self, batch: Compositions) -> Tensor:
        hidden = self.fractions.in_features
        x = self.elements(batch.numbers) + self.fractions(encode(batch.fractions, hidden))
        x = self.encoder(x, src_key_padding_mask=batch.numbers == 0)
        return self.readout((batch.fractions[..., None] * x).sum(dim=1), batch.state)


def encode(fractions: Tensor, size: int) -> Tensor:
    """Sines and cosines of fractions (...,), and of their logarithms, (..., size); ``size`` is a multiple of 4."""
    waves = torch.logspace(0, math.log10(RESOLUTION), size // 4, device=fractions.device)
    logarithm = -torch.log(fractions.clamp(min=1 / RESOLUTION)) / math.log(RESOLUTION)
    phases = [value[..., None] * waves for value in (fractions, logarithm)]
    return torch.cat([f(phase) for phase in phases for f in (torch.sin, torch.cos)], dim=-1)
