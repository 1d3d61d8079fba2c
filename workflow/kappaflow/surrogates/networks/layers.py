"""Layers that all networks share: elements in, a mean and a scale out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kappaflow.surrogates.networks import graphs

MAX_LOG_SCALE = 3.0
"""Bound on the logarithm of a scale in units of the standardised target, lest it overflows far from the data."""


def perceptron(inside: int, hidden: int, outside: int) -> nn.Sequential:
    """One hidden layer with SiLU."""
    return nn.Sequential(nn.Linear(inside, hidden), nn.SiLU(), nn.Linear(hidden, outside))


class Elements(nn.Module):
    """Features (m, hidden) of atomic numbers (m,): a linear map of element properties plus a learned part.

    The learned part starts at zero, so that an element which the training side lacks is known by its properties alone.
    """

    table: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        table = graphs.element_table()
        self.register_buffer("table", table, persistent=False)
        self.properties = nn.Linear(table.shape[1], hidden)
        self.learned = nn.Embedding(len(table), hidden)
        nn.init.zeros_(self.learned.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.properties(self.table[numbers]) + self.learned(numbers)


class Readout(nn.Module):
    """From features of crystals (m, inside) to the mean and the logarithm of the scale of the target, (m, 2).

    No gradient flows from the scale into the features: the mean is fitted as if there were none.
    """

    def __init__(self, inside: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inside, hidden), nn.SiLU(), nn.Dropout(dropout))
        self.mean = nn.Linear(hidden, 1)
        self.scale = perceptron(hidden, hidden // 2, 1)

    def forward(self, *x: Tensor) -> Tensor:
        h = self.hidden(torch.cat(x, dim=1))
        bounded = MAX_LOG_SCALE * torch.tanh(self.scale(h.detach()) / MAX_LOG_SCALE)
        return torch.cat([self.mean(h), bounded], dim=1)
