"""Least squares for measured times, which are never negative and of which some were disturbed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

_LARGE, _REWEIGHTINGS = 0.05, 10


def solve(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, of sums of `rows` that come nearest to `values` in relative error.

    Errors above 5 % count less than their square (Huber 1964, doi 10.1214/aoms/1177703732), so that a measurement in
    which a shared machine was busy does not bend the fit.
    """
    weights = 1 / np.maximum(np.asarray(values, dtype=float), 1e-9)
    matrix = np.asarray(rows, dtype=float) * weights[:, None]
    scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1.0)  # columns differ by powers of ten
    trust = np.ones(len(values))
    for _ in range(_REWEIGHTINGS):
        found, _ = nnls(matrix / scale * trust[:, None], trust)
        error = np.abs(matrix / scale @ found - 1)
        trust = np.sqrt(_LARGE / np.maximum(error, _LARGE))
    return [float(value) for value in found / scale]
