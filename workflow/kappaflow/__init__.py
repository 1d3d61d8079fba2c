"""kappaflow: from a list of crystals to conductivities, a dataset, benchmark splits and surrogates."""

__version__ = "0.1.0"
