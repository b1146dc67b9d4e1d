from __future__ import annotations

import pytest
import torch

from cmpt.masking.strategies import MaskStage
from cmpt.recipe.schema import Image, Masking

STRATEGIES = ["cluster", "random", "none"]


def images(count: int = 12, size: int = 48) -> torch.Tensor:
    """Smooth colour fields with some texture: patches that are alike, but not all."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    fine = torch.rand(count, 3, size, size, generator=generator) * 60
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (smooth * 0.8 + fine).clamp(0, 255).to(torch.uint8)


def stage(strategy: str, seed: int = 7, **masking: float) -> MaskStage:
    return MaskStage(Masking(strategy=strategy, **masking), Image(size=48), 8, seed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_has_the_same_mask_in_any_batch(strategy: str) -> None:
    pixels, ordinals = images(), torch.arange(100, 112)
    together = stage(strategy, threshold=0.7)(pixels, ordinals).keep_BL
    halves = [stage(strategy, threshold=0.7)(pixels[i::2], ordinals[i::2]).keep_BL for i in (0, 1)]
    assert torch.equal(together[0::2], halves[0])
    assert torch.equal(together[1::2], halves[1])


@pytest.mark.parametrize("strategy", ["cluster", "random"])
def test_masks_change_with_ordinal_and_seed(strategy: str) -> None:
    same = images(1).expand(12, -1, -1, -1)
    first = stage(strategy, threshold=0.7)(same, torch.arange(12)).keep_BL
    assert len({tuple(row) for row in first.tolist()}) == 12
    other_seed = stage(strategy, seed=8, threshold=0.7)(same, torch.arange(12)).keep_BL
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 18), (0.75, 9), (0.3, 25), (0.99, 1)])
def test_random_keeps_exactly_as_many_as_flip(ratio: float, kept: int) -> None:
    masked = stage("random", ratio=ratio)(images(), torch.arange(12))
    assert masked.patches.lengths == [kept] * 12


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_holes_keep_nothing_and_are_not_packed(strategy: str) -> None:
    valid = torch.ones(12, dtype=torch.bool)
    valid[[2, 9]] = False
    whole = stage(strategy, threshold=0.7)(images(), torch.arange(12))
    holed = stage(strategy, threshold=0.7)(images(), torch.arange(12), valid)
    assert not holed.keep_BL[~valid].any()
    assert torch.equal(holed.keep_BL[valid], whole.keep_BL[valid])
    assert sorted(holed.patches.order_B.tolist()) == [b for b in range(12) if valid[b]]


def test_unknown_strategy_names_field_and_choices() -> None:
    with pytest.raises(ValueError, match=r"masking.strategy='checkers' must be one of .*cluster"):
        stage("checkers")
