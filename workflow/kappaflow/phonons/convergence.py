"""Extrapolation of a conductivity to an infinitely dense mesh, and the error that follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kappaflow.dataset.tables import Row


def columns(series: Sequence[Row]) -> Row:
    """mesh_delta, kappa_extrapolated and mesh_error from rows (kappa, q_mesh) on two or more meshes, the finest first.

    What a mesh of N points per direction leaves out is the neighbourhood of Gamma, |q| < 1/N. With lifetimes that grow
    as 1/q^2 its share of kappa, the integral of q^2 v^2 tau dq, is proportional to 1/N: kappa(N) = k + a / N. Here N is
    the cube root of the number of points, and k and a are fitted by least squares. With lifetimes that grow more slowly
    k overshoots, so the error is rather too large (docs/transport.md has examples). It is that of kappa on the
    finest mesh relative to itself: its distance from k and, with three meshes or more, the standard error of k, added
    in quadrature.
    """
    finest, next_finest = (row["kappa"] for row in series[:2])
    kappa = np.array([row["kappa"] for row in series])
    design = np.array([[1, float(np.prod(row["q_mesh"])) ** (-1 / 3)] for row in series])
    fit = np.linalg.lstsq(design, kappa, rcond=None)[0]
    doubt = 0.0
    if len(series) > 2:
        variance = float(np.sum((design @ fit - kappa) ** 2)) / (len(series) - 2)
        doubt = float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
    return {
        "mesh_delta": (next_finest - finest) / finest,
        "kappa_extrapolated": float(fit[0]) if fit[0] > 0 else None,
        "mesh_error": float(np.hypot(fit[0] - finest, doubt)) / finest,
    }
