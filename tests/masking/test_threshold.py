from __future__ import annotations

import pytest
import torch

from cmpt.masking.cluster import hidden_counts
from cmpt.masking.threshold import ThresholdController


def batches(steps: int, drift: float = 0.0, size: int = 64) -> list[torch.Tensor]:
    """Similarities of images that differ much from each other: per-image level plus noise, drifting over steps."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(steps):
        level = torch.rand(size, 1, generator=generator) * 0.8
        noise = torch.randn(size, 100, generator=generator) * 0.15
        made.append((level + noise + drift * step / steps).clamp(-1, 1))
    return made


def run(controller: ThresholdController, similarities: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    ratios, thresholds = [], []
    for similarity_BL in similarities:
        if controller.settling:
            controller.calibrate(similarity_BL, lambda counts: counts)
        assert controller.threshold is not None
        thresholds.append(controller.threshold)
        hidden = hidden_counts(similarity_BL, controller.threshold, controller.min_ratio)
        ratios.append(float(hidden.sum()) / similarity_BL.numel())
        controller.update(ratios[-1])
    return ratios, thresholds


@pytest.mark.parametrize(("target", "min_ratio"), [(0.5, 0.3), (0.5, 0.0), (0.75, 0.3), (0.35, 0.3)])
def test_first_batch_is_on_target_and_so_is_the_mean_of_a_hundred(target: float, min_ratio: float) -> None:
    ratios, _ = run(ThresholdController(target, min_ratio), batches(100))
    assert abs(ratios[0] - target) < 0.005
    assert abs(sum(ratios) / 100 - target) < 0.01


def test_it_follows_drift_without_oscillation() -> None:
    _, thresholds = run(ThresholdController(0.5, 0.3), batches(300, drift=0.3, size=512))
    quarters = [sum(thresholds[i : i + 75]) / 75 for i in range(0, 300, 75)]
    assert quarters == sorted(quarters)
    steps = torch.tensor(thresholds).diff()
    assert steps.abs().max() < 0.02


def test_ranks_together_find_what_one_process_finds() -> None:
    whole = batches(1)[0]
    alone = ThresholdController(0.5, 0.3)
    alone.calibrate(whole, lambda counts: counts)
    other = whole[32:]

    class Together:
        """Adds the other rank's counts, found by replaying the same thresholds."""

        def __init__(self) -> None:
            self.calls: list[torch.Tensor] = []

        def record(self, counts: torch.Tensor) -> torch.Tensor:
            self.calls.append(counts)
            return sums[len(self.calls) - 1]

    # The thresholds tried depend on the sums alone: take the sums that the single process saw.
    sums: list[torch.Tensor] = []

    def keep(counts: torch.Tensor) -> torch.Tensor:
        sums.append(counts)
        return counts

    ThresholdController(0.5, 0.3).calibrate(whole, keep)
    parts = []
    for half in (whole[:32], other):
        together = Together()
        ranked = ThresholdController(0.5, 0.3)
        ranked.calibrate(half, together.record)
        assert ranked.state() == alone.state()
        parts.append(together.calls)
    assert all(torch.equal(a + b, total) for a, b, total in zip(*parts, sums, strict=True))


def test_state_goes_through_a_checkpoint() -> None:
    first = ThresholdController(0.5, 0.3)
    run(first, batches(5))
    second = ThresholdController(0.5, 0.3)
    second.load(first.state())
    assert run(first, batches(5)) == run(second, batches(5))


def test_a_scheduled_target_is_followed_at_once() -> None:
    """From 0.6 down to 0.4 over 200 steps: every window of 50 is on its own mean target."""
    controller, ratios, targets = ThresholdController(0.6, 0.3), [], []
    for step, similarity_BL in enumerate(batches(200, size=256)):
        controller.aim(0.6 - 0.2 * step / 199, 0.3)
        if controller.settling:
            controller.calibrate(similarity_BL, lambda counts: counts)
        assert controller.threshold is not None
        hidden = hidden_counts(similarity_BL, controller.threshold, controller.min_ratio)
        ratios.append(float(hidden.sum()) / similarity_BL.numel())
        targets.append(controller.target)
        controller.update(ratios[-1])
        if step == 120:  # through a checkpoint, in the middle
            resumed = ThresholdController(0.6, 0.3)
            resumed.load(controller.state())
            controller = resumed
    for first in range(0, 151):
        window = slice(first, first + 50)
        assert abs(sum(ratios[window]) - sum(targets[window])) / 50 < 0.01
