"""The controller that holds the mean mask ratio of the global batch at its target.

The first batches settle the threshold, the mean of what bisection finds on each global batch; from then on an integral
controller follows slow drift: threshold += gain * (ratio - target). The gain is a tenth of what would correct an error
at once, measured on the first batches, so the loop is overdamped and does not oscillate. The mean error over n steps is
the threshold's net movement / (n * gain), hence goes to zero as 1/n. A target that moves by schedule moves the
threshold at once by what the first batches say; other schedules (anchors, β, embeddings) are drift to it. Everything is
computed from counts summed over ranks, so the threshold is the same at every world size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmpt.masking.cluster import least_hidden

_GRID = 64  # thresholds tried at one time; three rounds give 2 / 64**3 = 8e-6
_ROUNDS = 3
_FIRST_BATCHES = 8
_SHARE_OF_ERROR = 0.1
_SLOPE_STEP = 0.02
_LEAST_SLOPE = 0.1  # mask ratio per unit of threshold; the clip art has 0.5


@dataclass
class ThresholdController:
    """State: `target`, `threshold` (cosine, -1 … 1; None before the first batch), `gain` (threshold per unit of ratio),
    `settled` (batches that were bisected)."""

    target: float
    min_ratio: float
    threshold: float | None = None
    gain: float = 0.0
    settled: int = 0

    @property
    def settling(self) -> bool:
        """Whether the next batch is to be bisected."""
        return self.settled < _FIRST_BATCHES

    def aim(self, target: float, min_ratio: float) -> None:
        """The schedule's values for the coming batch."""
        if self.threshold is not None:
            self._move(self.gain / _SHARE_OF_ERROR * (self.target - target))
        self.target, self.min_ratio = target, min_ratio

    def calibrate(self, similarity_BL: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take a batch into threshold and gain while `settling`; every rank calls it with its own images."""

        images, patches = similarity_BL.shape
        sorted_BL = similarity_BL.sort(dim=1).values
        least = least_hidden(patches, self.min_ratio)

        def ratios(thresholds: list[float]) -> list[float]:
            at_BN = torch.tensor(thresholds, device=sorted_BL.device).expand(images, -1).contiguous()
            hidden_BN = patches - torch.searchsorted(sorted_BL, at_BN, right=True)
            hidden_N = hidden_BN.clamp(least, patches - 1).sum(dim=0)  # `hidden_counts` of every threshold
            total_1 = torch.tensor([images * patches], device=hidden_N.device)
            *hidden, total = sum_over_ranks(torch.cat([hidden_N, total_1]).cpu()).tolist()
            return [h / max(total, 1) for h in hidden]

        low, high = -1.0, 1.0  # the ratio falls as the threshold rises
        for _ in range(_ROUNDS):
            step = (high - low) / _GRID
            grid = [low + step * i for i in range(_GRID + 1)]
            above = [t for t, ratio in zip(grid, ratios(grid), strict=True) if ratio > self.target]
            low = above[-1] if above else low
            high = min(low + step, 1.0)
        threshold = (low + high) / 2
        more, fewer = ratios([threshold - _SLOPE_STEP, threshold + _SLOPE_STEP])
        slope = (more - fewer) / (2 * _SLOPE_STEP)
        self.settled += 1
        self.gain += (_SHARE_OF_ERROR / max(slope, _LEAST_SLOPE) - self.gain) / self.settled
        before = threshold if self.threshold is None else self.threshold
        self.threshold = before + (threshold - before) / self.settled

    def update(self, ratio: float) -> None:
        """Follow the mean mask ratio of the global batch that was just masked."""
        if not self.settling:
            self._move(self.gain * (ratio - self.target))

    def _move(self, by: float) -> None:
        assert self.threshold is not None
        self.threshold = min(max(self.threshold + by, -1.0), 1.0)

    def state(self) -> dict[str, float | None]:
        return {"target": self.target, "threshold": self.threshold, "gain": self.gain, "settled": self.settled}

    def load(self, state: dict[str, float | None]) -> None:
        self.target = self.target if state["target"] is None else state["target"]
        self.threshold, self.gain = state["threshold"], state["gain"] or 0.0
        self.settled = int(state["settled"] or 0)
