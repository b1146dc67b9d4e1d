from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cmpt.data.eval_sets import EvalBatch
from cmpt.data.validate import DataError
from cmpt.evals import embed
from cmpt.evals.embed import Encoder
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Image, Model, Text, Vision

TOWER = {"width": 32, "layers": 1, "heads": 1}
ROUNDS, BATCH = 3, 2


class Images:
    """Six images for each of two ranks, two at a time."""

    def __len__(self) -> int:
        return 2 * ROUNDS * BATCH

    def batches(self, rank: int, world_size: int, batch_size: int, size: int) -> Iterator[EvalBatch]:
        for turn in range(ROUNDS):
            first = (turn * world_size + rank) * batch_size
            pixels = torch.full((batch_size, 3, size, size), first, dtype=torch.uint8)
            yield EvalBatch(pixels, torch.arange(first, first + batch_size), [])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_beats_alike_and_hears_of_what_is_not_finite(
    rank: int, tower: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe's features stay on the first rank, but what is wrong with them ends all ranks."""
    model = Model(patch_size=8, embed_dim=16, vision=Vision(**TOWER), text=Text(**TOWER), vocab_size=61)
    clip = CLIP(model, 16, seed=0)
    encoder = Encoder(clip, None, Image(size=16), 8, BATCH, rank, 2, torch.device("cpu"))  # type: ignore[arg-type]
    beats: list[None] = []
    encoder.beat = lambda: beats.append(None)

    def with_the_other(own: tuple[torch.Tensor, torch.Tensor, list[str]]) -> list[Any]:
        indices_B, rows, faults = own
        other = (indices_B + (BATCH if rank == 0 else -BATCH), torch.full_like(rows, value), faults)
        return [own, other] if rank == 0 else [other, own]

    monkeypatch.setattr(embed, "gather_objects", with_the_other)
    if value != 0.0:
        with pytest.raises(DataError, match="embeddings are not finite"):
            encoder.images(Images(), tower=tower)  # type: ignore[arg-type]
        return
    found = encoder.images(Images(), tower=tower)  # type: ignore[arg-type]
    assert len(beats) == ROUNDS
    assert found.shape == ((0,) if tower and rank else (12, 32 if tower else 16))
