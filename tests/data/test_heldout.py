"""Held-out pairs: each exactly once over the ranks."""

from __future__ import annotations

import pytest
import torch
from data.making import json_sample, text_sample, undecodable_jpeg, write_tar

from cmpt.data.heldout import HeldoutSet
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema

IMAGE = schema.Image(size=16)


@pytest.fixture
def urls(tmp_path) -> list[str]:
    for shard, count in enumerate((9, 14)):
        write_tar(tmp_path / f"h{shard}.tar", [text_sample(100 * shard + n) for n in range(count)])
    return [str(tmp_path / "h{0,1}.tar")]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 30])
def test_every_pair_once_and_ranks_in_step(urls, settings, world_size, batch_size) -> None:
    heldout = HeldoutSet(urls, settings, IMAGE)
    assert len(heldout) == 23
    ranks = [list(heldout.batches(rank, world_size, batch_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(index for batch in batches for index in batch.indices_B.tolist()) == list(range(23))
    sizes = {len(batch.captions) for batch in batches}
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    if world_size <= 23 and batch_size > 1:
        assert min(sizes) >= 1


def test_contents_do_not_depend_on_how_they_are_shared_out(urls, settings) -> None:
    heldout = HeldoutSet(urls, settings, IMAGE)
    (whole,) = heldout.batches(0, 1, 100)
    assert whole.images_BCHW.shape == (23, 3, 16, 16) and whole.images_BCHW.dtype == torch.uint8
    for rank in range(3):
        for batch in heldout.batches(rank, 3, 4):
            assert torch.equal(batch.images_BCHW, whole.images_BCHW[batch.indices_B])
            assert batch.captions == [whole.captions[index] for index in batch.indices_B.tolist()]


def test_broken_pairs_are_left_out_alike_and_counted(tmp_path, settings) -> None:
    settings.caption_extension, settings.caption_field, settings.category_field = "json", "captions", "category"
    samples = [json_sample(n, [f"first {n}", f"second {n}"], category=f"class {n % 2}") for n in range(9)]
    samples[2] = ("000002", {**samples[2][1], "jpg": b"garbage"})
    samples[4] = ("000004", {"jpg": samples[4][1]["jpg"]})
    samples[6] = ("000006", {**samples[6][1], "jpg": undecodable_jpeg(6)})
    samples[8] = json_sample(8, "alone")
    path = write_tar(tmp_path / "h.tar", samples)
    heldout = HeldoutSet([str(path)], settings, IMAGE)
    assert len(heldout) == 7
    assert [(r.key, r.cause) for r in heldout.rejections] == [
        ("h.tar/000002", Cause.UNKNOWN_SIGNATURE),
        ("h.tar/000004", Cause.MISSING_CAPTION),
    ]
    batches = [batch for rank in range(2) for batch in heldout.batches(rank, 2, 2)]
    assert sorted(i for batch in batches for i in batch.indices_B.tolist()) == [0, 1, 2, 3, 5, 6]
    assert [(r.key, r.cause) for b in batches for r in b.rejections] == [("h.tar/000006", Cause.DECODE_FAILED)]
    pairs = {
        batch.captions[b]: (batch.all_captions[b], batch.categories[b])
        for batch in batches
        for b in range(len(batch.captions))
    }
    assert pairs["first 3"] == (["first 3", "second 3"], "class 1")
    assert pairs["alone"] == (["alone"], None)


def test_a_set_without_any_usable_pair_is_a_fault(tmp_path, settings) -> None:
    path = write_tar(tmp_path / "h.tar", [("0", {"txt": b"x"})])
    with pytest.raises(DataError, match=r"data.heldout: none of 1 samples .*missing_image.*h\.tar/0"):
        HeldoutSet([str(path)], settings, IMAGE)
