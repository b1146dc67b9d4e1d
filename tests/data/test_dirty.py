"""Dirty bytes never stop a run and never go uncounted (invariant 7), whichever backend decodes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from data.dirty import kinds, write_dirty_shards
from data.making import jpeg, take, text_sample, write_tar

from cmpt.data.reader import ShardReader
from cmpt.data.streams import SourceOrder
from cmpt.data.validate import Cause
from cmpt.recipe import schema

GOOD, ROUNDS = 760, 2  # 32 broken samples, 5 shard-level faults and repetitions: 5 %


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_every_kind_is_counted_by_its_cause_and_nothing_stops(make_loader, settings, tmp_path, backend) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    expected = write_dirty_shards(tmp_path, GOOD, ROUNDS)
    settings.streams = 2
    pattern = str(tmp_path / "dirty-{0..3}.tar")
    loader = make_loader(pattern, batch_size=32, decode=schema.Decode(backend))
    assert {fault.key: fault.cause for fault in loader.shard_faults} == {
        key: cause for key, cause in expected.items() if "/" not in key
    }
    batches = take(loader, 27)  # a little more than an epoch
    counted = Counter((rejection.key, rejection.cause) for batch, _ in batches for rejection in batch.rejections)
    names = {key.removeprefix("repeated/"): cause for key, cause in expected.items() if "/" in key}
    assert {key: cause for key, cause in counted} == names
    assert max(counted.values()) <= 2  # in the epoch that was begun
    used = Counter(key for batch, _ in batches for key in batch.keys)
    assert not set(used) & {key for key, cause in expected.items() if cause != Cause.DECODE_FAILED}
    for number in range(ROUNDS):  # what is odd but whole is used
        for name, (cause, _) in kinds(number).items():
            if cause is None:
                assert any(f"{name}-{number}" in key for key in used)
    holes = {key for batch, _ in batches for key, valid in zip(batch.keys, batch.valid_B, strict=True) if not valid}
    assert holes == {key for key, cause in expected.items() if cause == Cause.DECODE_FAILED}
    for batch, _ in batches:
        assert torch.isfinite(batch.images_BCHW.float()).all()


def test_counts_are_exact_over_three_epochs(make_loader, settings, tmp_path) -> None:
    """Against the order itself: the very rejections, in their order, batch by batch."""
    expected = write_dirty_shards(tmp_path, 60, 1)
    settings.streams = 1
    loader = make_loader(str(tmp_path / "dirty-{0..3}.tar"), batch_size=4)
    sizes = [shard.count for shard in loader.shards[0]]
    order = SourceOrder(3, 0, sizes, 1).candidates(0, (0, 0))
    reader = ShardReader(8)
    seen = Counter[str]()
    for batch, _ in take(loader, 3 * sum(sizes) // 4):
        rejected, keys = [], []
        while len(keys) < 4:
            candidate = next(order)
            shard = loader.shards[0][candidate.unit]
            members = reader.members(shard, candidate.member)
            key = f"{shard.name}/{members.key}"
            cause = Cause.DUPLICATE_KEY if members.repeated else expected.get(key)
            if cause is None or cause == Cause.DECODE_FAILED:
                keys.append(key)
                seen[key] += 1
            else:
                rejected.append((key, cause))
        assert batch.keys == keys
        assert [(r.key, r.cause) for r in batch.rejections if r.cause != Cause.DECODE_FAILED] == rejected
    assert max(seen.values()) - min(seen.values()) <= 1


def test_sizes_are_bounded_before_memory_is_taken(make_loader, settings, tmp_path, monkeypatch) -> None:
    """An image and a caption beyond their limits are refused by the size in the index: no byte of them is read."""
    settings.max_image_bytes = 10_000
    large = {"jpg": jpeg(1) + bytes(20_000), "txt": b"large"}
    long = {"jpg": jpeg(2), "txt": b"word " * 10_000}
    write_tar(tmp_path / "s.tar", [("large", large), ("long", long), *(text_sample(n) for n in range(30))])
    sizes = []
    original = ShardReader.read
    monkeypatch.setattr(
        ShardReader, "read", lambda self, shard, extent: sizes.append(extent[1]) or original(self, shard, extent)
    )
    batches = take(make_loader(str(tmp_path / "s.tar")), 8)
    causes = {r.key: r.cause for batch, _ in batches for r in batch.rejections}
    assert causes == {"s.tar/large": Cause.TOO_MANY_BYTES, "s.tar/long": Cause.CAPTION_TOO_LONG}
    assert max(sizes) <= 10_000


def test_a_member_name_never_becomes_a_path(make_loader, settings, tmp_path) -> None:
    names = ["../../outside", "/etc/absolute", "a/../../b", "C:\\windows", "x" * 90]
    write_tar(tmp_path / "s.tar", [text_sample(n, name) for n, name in enumerate(names)])
    before = sorted(path for path in tmp_path.rglob("*"))
    keys = {key for batch, _ in take(make_loader(str(tmp_path / "s.tar"), batch_size=4), 6) for key in batch.keys}
    assert keys == {f"s.tar/{name}" for name in names}
    made = set(tmp_path.rglob("*")) - set(before)
    assert all((tmp_path / "cache") in [path, *path.parents] for path in made)


def test_stated_order_of_stretches_is_that_of_the_candidates() -> None:
    order = SourceOrder(5, 0, [7, 0, 3, 12], 3)
    walked = [(c.unit, c.member) for c in islice(order.candidates(1, (0, 2)), 40)]
    position, joined = (0, 2), []
    while len(joined) < 40:
        stretch = order.stretch(1, position)
        joined += [(stretch.unit, member) for member in order.members(stretch)]
        position = stretch.behind
    assert joined[:40] == walked
    assert np.unique([unit for unit, _ in walked]).tolist() == [0, 2, 3]
