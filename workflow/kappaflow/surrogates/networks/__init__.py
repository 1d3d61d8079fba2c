"""Surrogates that are trained end to end on crystals: graph networks, and a transformer of compositions."""
