"""What a step amounts to over all ranks: one small sum of integers on the host, once per step."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import torch

from cmpt.batch import ImageTextBatch, Rejection
from cmpt.dist.process_group import gather_objects, sum_over_ranks
from cmpt.masking.strategies import Masked
from cmpt.models.flops import training_flops
from cmpt.recipe.schema import Engine, Model


@dataclass(frozen=True)
class StepCounts:
    """Sums over all ranks; integers, so that they are the same at every world size."""

    kept_patches: int
    patches: int  # of all images that are not holes
    text_tokens: int
    flops: int
    holes: int
    rejections: list[Rejection]  # of all ranks: samples that could not be used
    stop_signal: int  # the number of a signal that some rank got, or 0
    parts_written: int  # ranks that have written their part of the checkpoint in progress
    parts_failed: int  # ranks that could not

    @property
    def mask_ratio(self) -> float:
        return 1 - self.kept_patches / max(1, self.patches)


def count_step(
    model: Model,
    masked: Masked,
    batch: ImageTextBatch,
    engine: Engine,
    stop_signal: int | None,
    part: tuple[bool, bool] = (False, False),
) -> StepCounts:
    """Collective. A rank that got a signal says so here, and all ranks stop after the same step.

    `part`: whether this rank's part of a checkpoint is written, or has failed (engine/checkpoint.py).
    """
    images = masked.patches.lengths
    cached = engine.micro_batch_size is not None and engine.micro_batch_size < len(batch.keys)
    local = [
        sum(images),
        len(images) * masked.keep_BL.shape[1],
        sum(batch.text.lengths),
        int(training_flops(model, images, batch.text.lengths, engine.batch_size, cached)),
        len(batch.keys) - len(images),
        len(batch.rejections),
        *(int(stop_signal == number) for number in (signal.SIGTERM, signal.SIGINT)),
        *(int(told) for told in part),
    ]
    *sums, rejected, terminated, interrupted, written, failed = sum_over_ranks(torch.tensor(local)).tolist()
    kept, patches, text_tokens, flops, holes = sums
    stop = int(signal.SIGTERM) if terminated else int(signal.SIGINT) if interrupted else 0
    rejections = [rejection for part in gather_objects(batch.rejections) for rejection in part] if rejected else []
    return StepCounts(kept, patches, text_tokens, flops, holes, rejections, stop, written, failed)
