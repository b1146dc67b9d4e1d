"""One order of samples at any world size, through kills, and as the ledger computes it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from data import rank_processes

from cmpt.data.ledger import Ledger, slots_digest
from cmpt.data.loader import batch_digest
from cmpt.data.reader import ShardReader
from cmpt.data.samples import sample_key
from cmpt.data.shards import Ranks, open_sources
from cmpt.data.streams import LoaderState
from cmpt.recipe import load_recipe

STEPS = 270  # three epochs of the source that is visited less
Step = dict[str, Any]


def start(world_size: int, steps: int, state: Path, output: Path) -> subprocess.Popen[bytes]:
    output.mkdir()
    command = [sys.executable, rank_processes.__file__, str(world_size), str(steps), str(state), str(output)]
    return subprocess.Popen(command, start_new_session=True)


def steps_of(output: Path) -> list[Step]:
    """What all ranks have recorded, joined in rank order; lines cut by a kill, and steps that some rank lacks, are not
    there."""
    ranks = []
    for path in sorted(output.iterdir(), key=lambda path: int(path.name)):
        ranks.append([json.loads(line) for line in path.read_text().split("\n")[:-1]])
    joined = []
    for parts in zip(*ranks, strict=False):
        states = [LoaderState.from_json(part["state"]) for part in parts]
        digests = [bytes.fromhex(digest) for part in parts for digest in part["digests"]]
        joined.append(
            {
                "step": states[0].step,
                "digest": batch_digest(digests),
                "keys": [key for part in parts for key in part["keys"]],
                "state": LoaderState.merge(states).to_json(),
            }
        )
    return joined


def steps_done(output: Path) -> int:
    """By all ranks; looks at their last whole lines only, so that the ranks do not come to their end meanwhile."""
    last = [path.read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2] for path in output.iterdir()]
    return min(LoaderState.from_json(json.loads(line)["state"]).step if line else 0 for line in last)


def read_and_kill(world_size: int, at_step: int, state: Path, output: Path) -> list[Step]:
    """Reads on from `state`, kills every rank at some moment after `at_step`; what was recorded until then."""
    process = start(world_size, STEPS, state, output)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if len(list(output.iterdir())) == world_size and steps_done(output) >= at_step:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    return steps_of(output)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    folder = tmp_path_factory.mktemp("plain")
    assert start(1, STEPS, folder / "none", folder / "out").wait(timeout=200) == 0
    return steps_of(folder / "out")


@pytest.mark.multiprocess
def test_four_two_one_two_processes_with_kills_read_what_one_reads(uninterrupted: list[Step], tmp_path: Path) -> None:
    seen: list[Step] = []
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed of the kills: {seed}")  # shown where the test fails
    state, chance = tmp_path / "state.json", random.Random(seed)
    for nth, world_size in enumerate((4, 2, 1)):
        seen += read_and_kill(world_size, 50 * (nth + 1) + chance.randrange(40), state, tmp_path / f"part{nth}")
        kept = chance.randrange(len(seen) - 5, len(seen))  # the checkpoint is some steps older than the kill
        seen = seen[: kept + 1]
        state.write_text(json.dumps(seen[-1]["state"]))
    assert start(2, STEPS, state, tmp_path / "last").wait(timeout=200) == 0
    seen += steps_of(tmp_path / "last")
    assert [step["step"] for step in seen] == list(range(1, STEPS + 1))
    assert seen == uninterrupted  # digests, keys in order and states


@pytest.mark.multiprocess
def test_the_ledger_computes_the_order_and_every_sample_comes_once_per_epoch(
    uninterrupted: list[Step], tmp_path: Path
) -> None:
    recipe = load_recipe(rank_processes.RECIPE, [*rank_processes.OVERRIDES, f"data.cache_folder={tmp_path}"]).recipe
    shards, reader = open_sources(recipe.data, Ranks()), ShardReader(8)
    ledger = Ledger(
        recipe.run.seed,
        [[shard.count for shard in source] for source in shards],
        [source.weight for source in recipe.data.train],
        streams=8,
        batch_size=64,
    )
    visits: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)  # (source, epoch) -> key -> visits
    state = None
    for step in uninterrupted:
        slots = ledger.step(step["step"], state)
        keys = [
            sample_key(shard, reader.members(shard, slot.member))
            for slot in slots
            for shard in [shards[slot.source][slot.unit]]
        ]
        assert keys == step["keys"]
        assert slots_digest(slots, keys, streams=8) == step["digest"]
        for slot, key in zip(slots, keys, strict=True):
            visits[slot.source, slot.epoch][key] += 1
        state = LoaderState.from_json(step["state"])
    for source, part in enumerate(shards):
        samples = sum(shard.count for shard in part)
        for epoch in range(3):
            assert len(visits[source, epoch]) == samples
            assert set(visits[source, epoch].values()) == {1}
    for step in random.Random(5).sample(uninterrupted, 5):  # from the beginning of the run too
        slots = ledger.step(step["step"])
        keys = [
            sample_key(shard, reader.members(shard, slot.member))
            for slot in slots
            for shard in [shards[slot.source][slot.unit]]
        ]
        assert keys == step["keys"]
