"""Batches with their masks; on CUDA the next batch is masked beside the step of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cmpt.batch import ImageTextBatch
from cmpt.data.loader import Item
from cmpt.data.streams import LoaderState
from cmpt.engine.plan import PlannedPhase
from cmpt.masking.strategies import Masked, MaskStage

Upcoming = tuple[ImageTextBatch, LoaderState, Callable[[], Masked]]


class Feed:
    """Iterates over (batch on the device, loader state behind it, masked) up to the end of a phase.

    `look_ahead`, called between `mask.advance` and the step's work, starts on the next batch; where nothing would be
    gained (on a CPU) or the mask may not run ahead, it does nothing. Either way the run is the same.
    """

    def __init__(
        self,
        batches: Iterator[Item],
        mask: MaskStage,
        planned: PlannedPhase,
        steps_done: int,
        device: torch.device,
        arrived: Callable[[int], None] = lambda steps_done: None,
        ahead: bool | None = None,
    ) -> None:
        """`arrived` is told, whenever a batch has come and is about to be masked, how many steps it follows."""
        self._batches, self._mask, self._planned = batches, mask, planned
        self._steps, self._device, self._arrived = steps_done, device, arrived
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._upcoming: Upcoming | None = None

    def _begin(self) -> Upcoming:
        batch, position = next(self._batches)
        self._arrived(self._steps)
        batch = batch.to(self._device)
        progress = self._planned.progress(self._steps)
        self._steps += 1  # of those that were begun
        return batch, position, self._mask.begin(batch.images_BCHW, batch.ordinal_B, batch.valid_B, progress)

    def look_ahead(self) -> None:
        if (
            self._ahead
            and self._mask.may_run_ahead
            and self._upcoming is None
            and self._steps < self._planned.last_step
        ):
            self._upcoming = self._begin()

    def __iter__(self) -> Iterator[tuple[ImageTextBatch, LoaderState, Masked]]:
        while self._upcoming or self._steps < self._planned.last_step:
            batch, position, end = self._upcoming or self._begin()
            self._upcoming = None
            yield batch, position, end()
