"""Inner products of embeddings without rounding, so that equal embeddings score equally wherever they stand."""

from __future__ import annotations

from torch import Tensor

_STEPS = 2.0**26


def on_grid(rows: Tensor) -> Tensor:
    """Unit rows as float64 multiples of 2^-26, whose inner products float64 holds exactly.

    Products of entries are multiples of 2^-52, and no partial sum of the inner product of unit rows exceeds 1 (Cauchy
    and Schwarz), so nothing is rounded, in whatever order a matrix product adds. In fp32 the order, and with it the
    last bit, depends on the shape of a product and on the place in it, and would decide ties. An entry moves by
    7.5e-9 at most, which changes inner products less than their rounding in fp32.
    """
    return (rows.double() * _STEPS).round_().div_(_STEPS)
