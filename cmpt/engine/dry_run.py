"""One pass at the largest size before the first step: too little memory shows at once, not at step 40,000."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.distributed as dist

from cmpt.batch import PackedPatches, PackedText
from cmpt.engine import sharded
from cmpt.engine.build import Trained
from cmpt.engine.step import find_gradient
from cmpt.masking.strategies import most_kept
from cmpt.recipe import ResolvedPhase
from cmpt.recipe.schema import Recipe

# What torch says on a host; the second is oneDNN's, which has only this to say.
_NO_MEMORY = ("can't allocate memory", "could not create a primitive", "could not execute a primitive")


class OutOfMemoryError(RuntimeError):
    """The batch does not fit; the message says how large it was and what to change."""


@dataclass(frozen=True)
class LargestBatch:
    """The most tokens that a rank can meet in one step."""

    pairs: int
    grid: tuple[int, int]  # patches per column and row
    kept: int  # patches of every image
    words: int  # tokens of every caption

    def __str__(self) -> str:
        return f"{self.pairs} images of {self.kept} patches and captions of {self.words} tokens"


def largest_batch(recipe: Recipe, phases: list[ResolvedPhase], pairs: int) -> LargestBatch:
    """Of the phase with the most kept patches, and of that with the longest captions."""
    patch = recipe.model.patch_size
    assert patch
    sides = [(phase, phase.image.size // patch) for phase in phases]
    kept, side = max((most_kept(phase.masking, (side, side)), side) for phase, side in sides)
    context = recipe.model.context_length
    words = max(min(context, phase.text_masking.tokens or context) for phase in phases)
    return LargestBatch(pairs, (side, side), kept, words)


def dry_run(trained: Trained, recipe: Recipe, largest: LargestBatch) -> float:
    """Forward and backward of such a batch; nothing is stepped. Collective. Returns the seconds that it took.

    The optimizer's moments, which the first step may only make, take their memory meanwhile. Raises OutOfMemoryError
    with advice where the memory is not enough.
    """
    began, device = time.perf_counter(), trained.engine.device
    assert recipe.model.patch_size and recipe.model.vocab_size
    pairs, tokens = largest.pairs, largest.pairs * largest.kept
    order_B = torch.arange(pairs, device=device)
    with memory_advice(recipe, largest):
        moments = sharded.kept_tensors(trained.engine, None)
        patches_TP = torch.zeros(tokens, 3 * recipe.model.patch_size**2, dtype=torch.float32, device=device)
        position_T = torch.arange(largest.kept, device=device).repeat(pairs)
        images = PackedPatches(patches_TP, position_T, list(repeat(largest.kept, pairs)), order_B, largest.grid)
        ids_U = torch.arange(pairs * largest.words, device=device) % recipe.model.vocab_size
        position_U = torch.arange(largest.words, device=device).repeat(pairs)
        text = PackedText(ids_U, position_U, list(repeat(largest.words, pairs)), order_B)
        ahead = next_batch(largest, recipe.model.patch_size, trained) if device.type == "cuda" else []
        find_gradient(trained, images, text, None, recipe.loss, recipe.engine.micro_batch_size)
        sharded.discard(trained.engine)  # an overflow here says nothing about the loss scale
        del moments, ahead
    return time.perf_counter() - began


def next_batch(largest: LargestBatch, patch_size: int, trained: Trained) -> list[torch.Tensor]:
    """What is on the device of the batch that is masked beside the step (engine/feed.py): its pixels and patches."""
    patches, device = largest.grid[0] * largest.grid[1], trained.engine.device
    pixels = torch.empty(largest.pairs * patches, 3 * patch_size**2, dtype=torch.uint8, device=device)
    kept = (largest.pairs * largest.kept, 3 * patch_size**2)
    return [pixels, torch.empty(kept, dtype=trained.clip.compute_dtype, device=device)]


@contextmanager
def memory_advice(recipe: Recipe, largest: LargestBatch) -> Iterator[None]:
    """Turns an error that torch raises for want of memory into one that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = (str(error) or "no memory for a Python object").splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(s in told for s in _NO_MEMORY):
            raise
        micro = min(recipe.engine.micro_batch_size or largest.pairs, largest.pairs)
        advice = []
        if micro > 1:
            advice.append(f"engine.micro_batch_size={micro // 2} (gradient caching: the same batch in smaller parts)")
        if not recipe.model.activation_checkpointing:
            advice.append("model.activation_checkpointing=true")
        if dist.get_world_size() > 1 and recipe.engine.zero_stage < 3:
            advice.append(f"engine.zero_stage={recipe.engine.zero_stage + 1}")
        advice.append("more processes, or a smaller engine.batch_size")
        raise OutOfMemoryError(
            f"too little memory for the largest batch of this recipe, {largest} per rank, {micro} at a time: "
            f"{told.rstrip('. ')}. Try, in this order: {'; '.join(advice)}"
        ) from error
