"""The kappa-103 benchmark: an engine's conductivities compared mode by mode with a reference (docs/srme.md)."""
