"""Surrogate models of the conductivity: features, models and their honest comparison (docs/surrogates.md)."""
