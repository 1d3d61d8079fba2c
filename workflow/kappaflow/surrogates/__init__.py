"""Surrogate models of the conductivity: descriptors, models and their honest comparison."""
