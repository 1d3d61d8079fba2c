"""Schedulers that Snakemake drives through commands: PBS and Fujitsu's Technical Computing Suite (pjsub).

The scripts ``submit``, ``status`` and ``cancel`` of a profile call this package, which needs Python's standard library
and ``jobs`` only.
"""
