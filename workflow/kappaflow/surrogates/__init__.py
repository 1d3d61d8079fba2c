"""Surrogate models of the conductivity: descriptors, models and their honest comparison."""

NETWORKS: frozenset[str] = frozenset()
"""Models whose training wants a GPU."""
