"""Looking ahead changes nothing but when masks are made."""

from __future__ import annotations

import itertools

import pytest
import torch

from cmpt.batch import ImageTextBatch
from cmpt.data.streams import LoaderState
from cmpt.data.tokenizer import pack_captions
from cmpt.engine.feed import Feed
from cmpt.engine.plan import PlannedPhase
from cmpt.masking.strategies import MaskStage
from cmpt.recipe import phases
from cmpt.recipe.schema import Image, Masking, Recipe, Run

STEPS, BATCH, SIZE = 12, 8, 48


def batches(first: int = 0):
    """Images whose similarity drifts, so that the threshold moves."""
    for step in itertools.count(first):
        generator = torch.Generator().manual_seed(step)
        coarse = torch.rand(BATCH, 3, 4, 4, generator=generator) * 255
        smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
        fine = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator) * (20 + 5 * step)
        batch = ImageTextBatch(
            images_BCHW=(0.7 * smooth + fine).clamp(0, 255).to(torch.uint8),
            text=pack_captions([[1, 2]] * BATCH),
            ordinal_B=torch.arange(step * BATCH, (step + 1) * BATCH),
            valid_B=torch.arange(BATCH) != step % BATCH,  # a hole in every batch
            keys=[str(n) for n in range(BATCH)],
            stream_digests=[],
            rejections=[],
        )
        yield batch, LoaderState(step + 1, {})


def run(masking: Masking, ahead: bool, stop: int = STEPS, state: dict | None = None, done: int = 0):
    """What a training loop sees of a phase: masks, thresholds, positions, and the controller's state at the end."""
    (phase,) = phases(Recipe(run=Run(duration=f"{STEPS} steps"), masking=masking, image=Image(size=SIZE)))
    planned = PlannedPhase(phase, 0, STEPS, 0, BATCH)
    mask = MaskStage(masking, phase.image, 8, seed=3, embed=lambda patches, grid: patches[..., :7])
    if state:
        mask.load_state(state)
    arrived: list[int] = []
    feed = Feed(batches(done), mask, planned, done, torch.device("cpu"), arrived.append, ahead)
    seen, begun = [], []
    for batch, position, masked in feed:
        ratio = 1 - float(masked.keep_BL[batch.valid_B].double().mean())
        mask.advance(ratio)
        feed.look_ahead()
        begun.append(arrived[-1])
        saved = mask.state()
        seen.append((masked.keep_BL.tolist(), masked.threshold, ratio, position.step, int(batch.ordinal_B[0])))
        if position.step == stop:
            break
    return seen, saved, begun


@pytest.mark.parametrize("masking", [Masking(), Masking(ratio_end=0.4), Masking(strategy="random", ratio_end=0.2)])
def test_a_feed_that_looks_ahead_gives_the_same_masks_and_resumes_the_same(masking: Masking) -> None:
    plain, _, now = run(masking, ahead=False)
    ahead, _, before = run(masking, ahead=True)
    assert len(plain) == STEPS and plain == ahead
    settled = 7 if masking.strategy == "cluster" else 0  # the first batches settle the threshold, at their own time
    assert now == list(range(STEPS))
    assert before == [*range(settled), *range(settled + 1, STEPS), STEPS - 1]
    for stop in (1, 5, 8, 10):
        first, state, _ = run(masking, ahead=True, stop=stop)
        rest, _, _ = run(masking, ahead=True, state=state, done=stop)
        assert first + rest == plain


def test_masks_that_need_the_weights_are_not_made_ahead() -> None:
    _, _, begun = run(Masking(embedding_share_end=1.0), ahead=True)
    assert begun == list(range(STEPS))
