"""Judges every step before the optimizer takes it: is its loss or gradient not finite, is its loss a spike?"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from cmpt.recipe.schema import Guard

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_SPREAD = 1e-3  # of the median; losses that hardly differ must not make a spike of nothing


class TrainingDivergedError(RuntimeError):
    """Training cannot go on, or is not to: the recipe says so, or there is nothing to go on from."""


class LossGuard:
    """Compares each loss with the last ones that passed; the same decisions on every rank and after a resume.

    The estimate is the median and the median absolute deviation, which a spike that got through hardly moves. Refused
    losses do not enter it. `refused`: batches that were left out so far, in the whole run. `state` is that of a
    checkpoint, or empty.
    """

    def __init__(self, guard: Guard, state: Mapping[str, Any]) -> None:
        self._guard = guard
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=guard.window)
        self._phase: str = state.get("phase", "")
        self.refused: int = state.get("refused", 0)

    def begin(self, phase: str) -> None:
        """A phase begins, or goes on after a resume. Another one has another level of loss: start the estimate anew."""
        if phase != self._phase:
            self._losses.clear()
            self._phase = phase

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Why a step must not be taken, e.g. "the loss is nan"; None for a step that may."""
        fault = self._fault(loss, gradient_norm)
        if fault is None:
            self._losses.append(loss)
        else:
            self.refused += 1
        return fault

    def rewind(self, state: Mapping[str, Any]) -> None:
        """The weights of a checkpoint are back, with its state: compare with the losses before it, which may have been
        higher than the last ones; with none, if those are of another phase. `refused` goes on."""
        losses = state.get("losses", ()) if state.get("phase", "") == self._phase else ()
        self._losses = deque(losses, maxlen=self._guard.window)

    @property
    def exhausted(self) -> bool:
        """Whether more batches were refused than the recipe allows."""
        return self.refused > self._guard.limit

    def _fault(self, loss: float, gradient_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the norm of the gradient is {gradient_norm}"
        if self._guard.spike is None or 2 * len(self._losses) < self._guard.window:
            return None
        median = statistics.median(self._losses)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(past - median) for past in self._losses)
        deviation = max(deviation, _LEAST_SPREAD * abs(median), 1e-12)
        above = (loss - median) / deviation
        if above <= self._guard.spike:
            return None
        return f"the loss {loss:.4g} is {above:.1f} deviations above {median:.4g}, the median of the last steps"

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "phase": self._phase, "refused": self.refused}
