from __future__ import annotations

import pytest
import torch
from engine.ranks import Matrix
from engine.small import IMAGE_SIZE, MODEL

from cmpt.engine.build import build
from cmpt.engine.dry_run import LargestBatch, OutOfMemoryError, largest_batch, memory_advice, next_batch
from cmpt.masking.strategies import MaskStage, most_kept
from cmpt.models.clip import CLIP
from cmpt.recipe import phases
from cmpt.recipe.schema import Engine, Image, Masking, Model, Optimizer, Phase, Recipe, Run, TextMasking

LARGEST = LargestBatch(pairs=64, grid=(4, 4), kept=11, words=32)


def most_seen(masking: Masking, side: int) -> int:
    """The largest number of patches that any of 512 images of noise keeps; half of them plain in places."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (512, 3, side * 8, side * 8), dtype=torch.uint8, generator=generator)
    images[::2, :, : side * 4] = 128
    return int(MaskStage(masking, Image(size=side * 8), 8, seed=3)(images, torch.arange(512)).keep_BL.sum(1).max())


@pytest.mark.parametrize("side", [3, 4, 7])
@pytest.mark.parametrize(
    "masking",
    [
        Masking(strategy="none"),
        Masking(strategy="random", ratio=0.5),
        Masking(strategy="random", ratio=0.75),
        Masking(strategy="random", ratio=0.99),
        Masking(strategy="centred", ratio=0.6),
        Masking(strategy="block", ratio=0.6),
        Masking(strategy="block", ratio=0.6, block="drop"),
        Masking(strategy="grid", ratio=0.75),
        Masking(strategy="cluster", ratio=0.5, min_ratio=0.3),
        Masking(strategy="cluster", ratio=0.7, min_ratio=0.7),
        Masking(strategy="cluster", threshold=0.99, min_ratio=0.2),
        Masking(strategy="cluster", threshold=0.99, min_ratio=0.99),
    ],
    ids=lambda masking: f"{masking.strategy}-{masking.ratio}-{masking.min_ratio}-{masking.threshold}-{masking.block}",
)
def test_the_most_that_a_strategy_can_keep_is_what_masks_of_images_reach(masking: Masking, side: int) -> None:
    assert most_seen(masking, side) == most_kept(masking, (side, side))


@pytest.mark.parametrize("side", [3, 7])
def test_with_few_drops_the_anchors_are_hidden_still(side: int) -> None:
    masking = Masking(strategy="cluster", threshold=0.99, min_ratio=0.0, anchor_ratio=0.1)
    anchors = max(1, int(0.1 * side * side))
    assert most_seen(masking, side) == side * side - anchors == most_kept(masking, (side, side))


def test_a_schedule_counts_where_it_hides_least() -> None:
    assert most_kept(Masking(min_ratio=0.5, min_ratio_end=0.2, ratio=0.5), (5, 20)) == 80
    assert most_kept(Masking(strategy="centred", ratio=0.5, ratio_end=0.25), (10, 10)) == 75
    assert most_kept(Masking(strategy="grid", ratio=0.75), (3, 5)) == 6


def test_the_next_batch_is_as_large_as_what_masking_makes_of_it(alone: None) -> None:
    trained = build(CLIP(MODEL, IMAGE_SIZE, seed=0), Engine(batch_size=4), Optimizer(), 1, torch.device("cpu"))
    pixels, patches = next_batch(LargestBatch(pairs=5, grid=(4, 6), kept=11, words=32), 8, trained)
    assert pixels.nbytes == 5 * 3 * 32 * 48 and patches.shape == (55, 192)
    assert patches.dtype == trained.clip.compute_dtype == torch.bfloat16


def test_the_dry_run_is_as_large_as_the_largest_phase_that_is_left() -> None:
    recipe = Recipe(
        run=Run(duration=None),
        model=Model(patch_size=8, context_length=32),
        image=Image(size=32),
        masking=Masking(strategy="cluster", ratio=0.5, min_ratio=0.3),
        phases=[
            Phase(name="masked", duration="5 steps"),
            Phase(name="large", duration="2 steps", set={"image.size": 48}),
            Phase(name="whole", duration="2 steps", set={"masking.strategy": "none"}),
        ],
    )
    masked, large, whole = phases(recipe)
    assert largest_batch(recipe, [masked, large, whole], 64) == LargestBatch(64, (6, 6), 25, 32)
    assert largest_batch(recipe, [masked, whole], 64) == LargestBatch(64, (4, 4), 16, 32)
    assert largest_batch(recipe, [masked], 64) == LARGEST


def test_the_captions_of_the_dry_run_are_the_longest_that_text_masking_leaves() -> None:
    recipe = Recipe(
        run=Run(duration=None),
        model=Model(patch_size=8, context_length=32),
        image=Image(size=32),
        text_masking=TextMasking("random", 8),
        phases=[
            Phase(name="masked", duration="5 steps"),
            Phase(name="longer", duration="2 steps", set={"text_masking.tokens": 12}),
            Phase(
                name="whole",
                duration="2 steps",
                set={"text_masking.strategy": "none", "text_masking.tokens": None},
            ),
        ],
    )
    masked, longer, whole = phases(recipe)
    most = {len(left): largest_batch(recipe, left, 4).words for left in ([masked], [masked, longer])}
    assert most == {1: 8, 2: 12}
    assert largest_batch(recipe, [masked, longer, whole], 4).words == 32


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"),
    [(1, "half_dry_run"), *(pytest.param(world, "dry_run", marks=pytest.mark.slow) for world in (1, 2))],
)
def test_a_dry_run_changes_nothing(world: int, cases: str, matrix: Matrix) -> None:
    """Before the first step and between two: weights, moments, average, loss scale, and all that follows, bit by bit.

    Every ZeRO stage, offloaded too, with and without gradient caching, and in fp16 at a loss scale that overflows.
    """
    found = matrix(world, "guard_matrix", cases)
    stages = 4 if world == 1 else 7
    assert len(found) == (3 * stages if cases == "dry_run" else stages + (stages + 1) // 2)
    assert not {case: told for case, told in found.items() if not all(told.values())}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("engine", "checkpointing", "expected"),
    [
        (Engine(), False, ["engine.micro_batch_size=32", "model.activation_checkpointing=true", "more processes"]),
        (Engine(micro_batch_size=7), True, ["engine.micro_batch_size=3", "more processes"]),
        (Engine(micro_batch_size=1), True, ["more processes"]),
    ],
)
def test_the_advice_names_only_what_can_still_be_changed(
    engine: Engine, checkpointing: bool, expected: list[str]
) -> None:
    recipe = Recipe(engine=engine, model=Model(activation_checkpointing=checkpointing))
    with pytest.raises(OutOfMemoryError) as caught, memory_advice(recipe, LARGEST):
        torch.empty(1 << 60, dtype=torch.uint8)  # no machine has it
    told, _, advice = str(caught.value).partition("Try, in this order: ")
    assert "64 images of 11 patches and captions of 32 tokens per rank" in told and "allocate" in told
    assert [one.split(" (")[0].split(",")[0] for one in advice.split("; ")] == expected


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_every_kind_of_memory_error_gets_the_advice(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="too little memory"), memory_advice(Recipe(), LARGEST):
        raise error


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="size mismatch") as caught, memory_advice(Recipe(), LARGEST):
        raise RuntimeError("size mismatch")
    assert not isinstance(caught.value, OutOfMemoryError)
