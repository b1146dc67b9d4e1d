"""Durations with a unit: "32 epochs", "2000 steps", "12.8e9 samples". Torch-free."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction

UNITS = ("epochs", "steps", "samples")
_DURATION = re.compile(r"\s*([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Duration:
    """A length of training. `unit` is "epochs", "steps" or "samples"; `amount` need not be whole."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"

    def samples(self, samples_per_epoch: int | None, batch_size: int) -> float:
        """The same length in samples. `samples_per_epoch` may be None where the unit is not epochs."""
        return float(self._samples(samples_per_epoch, batch_size))

    def steps(self, samples_per_epoch: int | None, batch_size: int) -> int:
        """The same length in whole optimizer steps of `batch_size` samples, rounded up, at least 1."""
        return max(1, math.ceil(self._samples(samples_per_epoch, batch_size) / batch_size))

    def _samples(self, samples_per_epoch: int | None, batch_size: int) -> Fraction:
        # The decimal digits as written, not their binary neighbour: "1.1 epochs" of 10 batches is 11 steps, not 12.
        amount = Fraction(repr(self.amount))
        if self.unit == "samples":
            return amount
        if self.unit == "steps":
            return amount * batch_size
        if not samples_per_epoch:
            raise ValueError(f'duration "{self}": the number of samples per epoch is not known')
        return amount * samples_per_epoch


def parse_duration(text: str) -> Duration:
    """`"32 epochs"` -> Duration(32.0, "epochs"). Raises ValueError that says what is wrong with `text`."""
    units = '"epochs", "steps" or "samples"'
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f'expected a number and a unit, such as "2000 steps"; units are {units}')
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"has no unit; add {units}")
    name = unit.lower() if unit.lower().endswith("s") else unit.lower() + "s"
    if name not in UNITS:
        near = get_close_matches(name, UNITS, n=1, cutoff=0.5)
        raise ValueError(f'unknown unit "{unit}"; ' + (f'did you mean "{near[0]}"?' if near else f"expected {units}"))
    amount = float(number)
    if amount < 0 or not math.isfinite(amount):
        raise ValueError("must not be negative" if amount < 0 else "must be finite")
    return Duration(amount, name)
