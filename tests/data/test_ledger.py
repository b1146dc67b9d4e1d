"""The pure function that says which samples are in a step, against loaders that had to leave samples out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data.dirty import write_dirty_shards
from data.making import take, text_sample, write_tar

from cmpt.data.ledger import Ledger, LeftOut, checked, newest_state, of_events, slots_digest
from cmpt.data.loader import Loader, batch_digest
from cmpt.data.reader import ShardReader
from cmpt.data.samples import sample_key
from cmpt.data.streams import LoaderState, SourceOrder
from cmpt.data.validate import Cause, DataError


def ledger_of(loader: Loader, left_out: LeftOut, weights: list[float], batch_size: int, streams: int) -> Ledger:
    sizes = [[shard.count for shard in source] for source in loader.shards]
    return Ledger(3, sizes, weights, streams=streams, batch_size=batch_size, left_out=left_out)


def events_of(batches: list[Any]) -> list[dict[str, Any]]:
    return [
        {"kind": "skip", "step": state.step, **vars(rejection)}
        for batch, state in batches
        for rejection in batch.rejections
    ]


def test_the_order_of_dirty_weighted_sources_is_computed_from_the_events(make_loader, settings, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_dirty_shards(tmp_path / "a", 90, 1)
    write_dirty_shards(tmp_path / "b", 60, 1)
    patterns = [str(tmp_path / f"{name}/dirty-{{0..3}}.tar") for name in "ab"]
    loader = make_loader(*patterns, weights=(1.0, 2.0), batch_size=8)
    batches = take(loader, 60)
    reader = ShardReader(16)
    left_out = of_events(events_of(batches), loader.shards)
    ledger = ledger_of(loader, left_out, [1.0, 2.0], 8, 4)
    for nth, (batch, _) in enumerate(batches, 1):
        for start in (None, batches[nth // 2 - 1][1] if nth > 3 else None):
            slots = ledger.step(nth, start)
            keys = [
                sample_key(shard, reader.members(shard, slot.member))
                for slot in slots
                for shard in [loader.shards[slot.source][slot.unit]]
            ]
            assert keys == batch.keys
            assert [slot.ordinal for slot in slots] == batch.ordinal_B.tolist()
            assert slots_digest(slots, keys, 4) == batch_digest(batch.stream_digests)


def test_a_shard_that_was_lost_is_lost_in_the_ledger_too(make_loader, settings, tmp_path) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", [text_sample(20 * shard + n) for n in range(20)])
    settings.streams = 2
    loader = make_loader(str(tmp_path / "{0..5}.tar"), batch_size=4)
    (tmp_path / "3.tar").unlink()  # after it was indexed
    batches = take(loader, 40)
    events = events_of(batches)
    assert {event["cause"] for event in events} == {Cause.UNREACHABLE_SHARD}
    assert sum(event["samples"] for event in events if event["step"] <= 25) == 20
    ledger = ledger_of(loader, of_events(events, loader.shards), [1.0], 4, 2)
    for nth, (batch, _) in enumerate(batches, 1):
        keys = [f"{loader.shards[0][slot.unit].name}/{20 * slot.unit + slot.member:06d}" for slot in ledger.step(nth)]
        assert keys == batch.keys
    settings.broken_shards = "stop"
    with pytest.raises(DataError, match=r"3\.tar: cannot be opened"):
        take(loader, 40)


def test_streams_that_share_a_shard_lose_it_apart(make_loader, settings, tmp_path) -> None:
    """One that lost its rest says nothing about the other."""
    unit = SourceOrder(1, 0, [40, 40], 4).stretch(0, (0, 0)).unit
    left_out = LeftOut(lost={2: frozenset({(0, 0, unit)})})
    ledger = Ledger(1, [[40, 40]], [1.0], streams=4, batch_size=8, left_out=left_out)
    plain = Ledger(1, [[40, 40]], [1.0], streams=4, batch_size=8)
    for step in (2, 3):
        ours, whole = ledger.step(step), plain.step(step)
        assert [slot for slot in ours if slot.stream] == [slot for slot in whole if slot.stream]
        assert [slot for slot in ours if not slot.stream] != [slot for slot in whole if not slot.stream]


def test_a_step_far_out_is_computed_at_once() -> None:
    ledger = Ledger(1, [[10_000] * 50, [10_000] * 5], [5.0, 1.0], streams=64, batch_size=4096)
    slots = ledger.step(2_000)
    assert len(slots) == 4096 and slots[0].ordinal == 1_999 * 4096
    assert len({slot.stream for slot in slots}) == 64
    assert Ledger(1, [[10_000] * 50], [1.0], streams=64, batch_size=4096).step(1_000_000)[0].epoch > 8_000


def test_a_start_behind_the_step_is_refused() -> None:
    ledger = Ledger(1, [[100]], [1.0], streams=2, batch_size=4)
    with pytest.raises(ValueError, match="step must be above 7, got 7"):
        ledger.step(7, LoaderState(7, {0: ((0, 14),), 1: ((0, 14),)}))


def test_results_of_check_shards_and_checkpoints_are_read(make_loader, shard_pattern, tmp_path) -> None:
    loader = make_loader(shard_pattern)
    url = loader.shards[0][1].url
    result = tmp_path / "checked.json"
    result.write_text(
        json.dumps({"checks": "samples", "shards": [{"url": url, "unusable": [{"place": 3}, {"place": 0}]}]})
    )
    assert checked(result, loader.shards) == LeftOut({(0, 1): frozenset({0, 3})})
    result.write_text(json.dumps({"checks": "headers", "shards": []}))
    with pytest.raises(DataError, match="made with --headers-only"):
        checked(result, loader.shards)
    result.write_text("[]")
    with pytest.raises(DataError, match="is not a result of tools/check_shards.py"):
        checked(result, loader.shards)
    state = LoaderState(4, {0: ((0, 8),)})
    for step in (4, 8):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"loader": {**state.to_json(), "step": step}}))
    assert newest_state(tmp_path, 9).step == 8
    assert newest_state(tmp_path, 8).step == 4
    assert newest_state(tmp_path, 4) is None
    assert newest_state(Path("nowhere"), 4) is None
