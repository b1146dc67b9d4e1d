"""Shares of what is right."""

from __future__ import annotations

from torch import Tensor


def share(right_N: Tensor) -> float:
    """The fraction that is true."""
    return right_N.double().mean().item()


def mean_per_class(right_N: Tensor, label_N: Tensor) -> float:
    """The mean over the classes that have samples of the share that is right."""
    per_class = [share(right_N[label_N == c]) for c in label_N.unique().tolist()]
    return sum(per_class) / len(per_class)
