"""Linear probe: logistic regression on what the tower gives to its projection (arXiv 2103.00020, section 3.2)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.evals.accuracy import mean_per_class, share

# Appendix A.3: L-BFGS with at most 1,000 iterations; strengths from 1e-6 to 1e6 in 96 logarithmic steps, searched from
# every second decade by halving the distance around the best one.
MOST_ITERATIONS = 1000
STEPS, STEPS_PER_DECADE, FIRST_DISTANCE = 96, 8, 16
HELD_BACK = 10  # without a validation split every tenth training sample of a class is one


@dataclass(frozen=True)
class Features:
    """Of a split: rows [N, D] and classes [N]."""

    feature_ND: Tensor
    label_N: Tensor


def split_by_class(label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places to train on and to validate on: of each class that has several, a tenth, at least one, drawn once."""
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(label_N), dtype=torch.bool)
    for c in label_N.unique().tolist():
        places = (label_N == c).nonzero()[:, 0]
        count = max(1, len(places) // HELD_BACK) if len(places) > 1 else 0
        held[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def best_step(score: Callable[[int], float]) -> tuple[int, float]:
    """The step of the grid, 0 … 96, where `score` is largest, and its score: a coarse grid, then finer around its best.

    Among equals the weakest regularisation.
    """
    scores: dict[int, float] = {}
    candidates, distance = list(range(0, STEPS + 1, FIRST_DISTANCE)), FIRST_DISTANCE
    while True:
        for step in candidates:
            if step not in scores:
                scores[step] = score(step)
        best = max(sorted(scores), key=lambda step: scores[step])
        if distance == 1:
            return best, scores[best]
        distance //= 2
        candidates = [step for step in (best - distance, best + distance) if 0 <= step <= STEPS]


def strength(step: int) -> float:
    """The L2 strength at a step of the grid: 1e-6 … 1e6."""
    return 10.0 ** (step / STEPS_PER_DECADE - STEPS / STEPS_PER_DECADE / 2)


def linear_probe(train: Features, test: Features, validation: Features | None = None) -> dict[str, float]:
    """Accuracy on `test` of a regression on `train` and `validation` together, whose L2 was chosen between them.

    Raises ValueError where a train split has a single class, or none with two samples to choose the L2 on.
    Without `validation` a tenth of `train` is held back. `l2` is the strength as scikit-learn has it, 1 / C: of half
    the squared weights against the *sum* of the losses. `converged` is 0 where the last fit was cut off.
    """
    began = time.perf_counter()
    if validation is None:
        together, (kept, held) = train, split_by_class(train.label_N)
        if not len(held):
            raise ValueError("the train split has no class with two samples, of which one could choose the L2")
        train, validation = (Features(train.feature_ND[rows], train.label_N[rows]) for rows in (kept, held))
    else:
        parts = (train, validation)
        together = Features(torch.cat([part.feature_ND for part in parts]), torch.cat([part.label_N for part in parts]))
    chosen_on, fitted_on = _arrays(validation), _arrays(train)
    step, accuracy = best_step(lambda step: _fit(*fitted_on, strength(step))[0].score(*chosen_on))
    model, converged = _fit(*_arrays(together), strength(step))
    features, labels = _arrays(test)
    right_N = torch.from_numpy(model.predict(features) == labels)
    return {
        "top1": share(right_N),
        "mean_per_class": mean_per_class(right_N, test.label_N),
        "l2": strength(step),
        "validation_top1": float(accuracy),
        "train_samples": len(together.label_N),
        "samples": len(test.label_N),
        "converged": float(converged),
        "fit_s": time.perf_counter() - began,
    }


def _arrays(features: Features) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return features.feature_ND.numpy(), features.label_N.numpy()


def _fit(features: NDArray[np.float32], labels: NDArray[np.int64], l2: float) -> tuple[Any, bool]:
    """A scikit-learn model, and whether it came to its end; other warnings of the fit are given on."""
    from sklearn.exceptions import ConvergenceWarning  # an import of seconds, which only a probe needs
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=1 / l2, max_iter=MOST_ITERATIONS).fit(features, labels)
    cut_off = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for other in caught:
        if other not in cut_off:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return model, not cut_off
