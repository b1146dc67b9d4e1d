"""Training data behind URLs: a server that fails in every way, and runs that read what they read from the disk."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data.flaky_server import Fault, FlakyServer
from data.making import take, text_sample, write_tar
from data.test_loader import assert_same_batch

from cmpt.data.loader import Loader
from cmpt.data.places import Stall
from cmpt.data.reader import ShardReader
from cmpt.data.shards import Ranks, open_shards
from cmpt.data.streams import SourceOrder
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import schema

SHARDS, SAMPLES = 16, 12


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """Serves `SHARDS` shards; waits between attempts are short."""
    monkeypatch.setattr("cmpt.data.cache._MOST_WAIT_S", 0.02)
    folder = tmp_path / "served"
    folder.mkdir()
    for shard in range(SHARDS):
        write_tar(folder / f"{shard:02d}.tar", [text_sample(SAMPLES * shard + n) for n in range(SAMPLES)])
    running = FlakyServer(folder)
    yield running
    running.close()


@pytest.fixture
def remote(settings: schema.Data) -> schema.Data:
    settings.fetch_timeout_s, settings.fetch_workers = 1.5, 2
    return settings


def sizes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_a_run_from_a_failing_server_is_the_run_from_local_files(make_loader, server, remote) -> None:
    local = take(make_loader(str(server.folder / "{00..15}.tar")), 60)
    half = (server.folder / "03.tar").stat().st_size // 2
    server.faults = {
        "00.tar": [Fault(sends=half, then="reset"), Fault(status=500)],
        "01.tar": [Fault(sends=half, then="stall")],
        "02.tar": [Fault(status=404), Fault(status=503)],
        "03.tar": [Fault(sends=half, states="nothing"), Fault(sends=half)],
        "04.tar": [Fault(), Fault(sends=half, states="sent"), Fault(sends=0, states="nothing")],  # the second fetch
        "05.tar": [Fault(), Fault(body=b"<html>proxy</html>"), Fault(sends=100, then="reset")],
    }
    remote.cache_limit_bytes = 9 * (server.folder / "00.tar").stat().st_size
    cache = Path(remote.cache_folder) / "shards"
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], sizes(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        loader = make_loader(server.url("{00..15}.tar"))
        found = take(loader, 60)
    finally:
        done.set()
        watcher.join()
    for (batch, state), (expected, its_state) in zip(found, local, strict=True):
        assert_same_batch(batch, expected)
        assert state == its_state
    assert loader.data_fingerprint == make_loader(str(server.folder / "{00..15}.tar")).data_fingerprint
    assert 0 < most[0] <= remote.cache_limit_bytes
    assert max(server.requests.values()) > 3, "the cache was too large for this test"


def test_a_shard_that_goes_away_is_skipped_and_counted_or_stops_the_run(make_loader, server, remote) -> None:
    remote.fetch_attempts, remote.streams = 2, 2
    remote.cache_limit_bytes = 6 * (server.folder / "00.tar").stat().st_size
    loader = make_loader(server.url("{00..15}.tar"), batch_size=4)
    (server.folder / "07.tar").unlink()
    for copy in (Path(remote.cache_folder) / "shards").glob("*-07.tar"):
        copy.unlink()
    batches = take(loader, SHARDS * SAMPLES // 4)
    lost = [rejection for batch, _ in batches for rejection in batch.rejections]
    assert {(r.cause, r.key) for r in lost} == {(Cause.UNREACHABLE_SHARD, "07.tar")}
    assert SAMPLES <= sum(r.samples for r in lost) <= 2 * SAMPLES  # the epoch, and a part of the next one
    assert "404" in lost[0].detail or "22" in lost[0].detail
    assert all("07.tar" not in key for batch, _ in batches for key in batch.keys)
    remote.broken_shards = "stop"
    with pytest.raises(DataError, match=r"http.*/07\.tar"):
        take(make_loader(server.url("{00..15}.tar"), batch_size=4), SHARDS * SAMPLES // 4)


def test_a_network_that_is_gone_stops_the_run_instead_of_using_up_the_data(make_loader, server, remote) -> None:
    remote.fetch_attempts, remote.streams = 1, 1
    remote.cache_limit_bytes = 5 * (server.folder / "00.tar").stat().st_size
    loader = make_loader(server.url("{00..15}.tar"), batch_size=1)
    for path in server.folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"data\.train\.0 \(http.*8 shards in a row cannot be used \(unreachable_shard 8"
    ):
        take(loader, SHARDS * SAMPLES)


def test_a_shard_that_is_not_there_at_the_start_is_left_out_or_stops_the_run(make_loader, server, remote) -> None:
    remote.fetch_attempts = 1
    loader = make_loader(server.url("{00..16}.tar"))
    (fault,) = loader.shard_faults
    assert (fault.cause, fault.key) == (Cause.UNREACHABLE_SHARD, "16.tar")
    assert loader.samples_per_epoch == SHARDS * SAMPLES
    remote.broken_shards = "stop"
    with pytest.raises(DataError, match=r"data\.train: 1 of the first 17 shards cannot be had: http.*/16\.tar: "):
        make_loader(server.url("{00..16}.tar"))


class Hosts:
    """Ranks on hosts of their own, as threads: `gather` of each returns what all of them gave."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size)
        self._given: list[Any] = [None] * world_size

    def gather(self, rank: int, own: Any) -> list[Any]:
        self._given[rank] = own
        self._barrier.wait(20)
        all_of_them = list(self._given)
        self._barrier.wait(20)
        return all_of_them


def test_hosts_share_the_work_of_a_first_start(server, remote, tmp_path) -> None:
    hosts = Hosts(2)

    def start(rank: int) -> list[Any]:
        data = replace(remote, cache_folder=str(tmp_path / f"host{rank}"))
        return open_shards(
            [server.url("{00..15}.tar")], data, ranks=Ranks(rank, 2, lambda own: hosts.gather(rank, own))
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    assert [(shard.url, shard.count) for shard in first] == [(shard.url, shard.count) for shard in second]
    assert {shard.count for shard in first} == {SAMPLES}
    assert set(server.requests.values()) == {1}, "each shard was fetched by one of the hosts"


def test_a_fault_of_one_rank_is_raised_by_all(server, remote, tmp_path) -> None:
    hosts = Hosts(2)
    (tmp_path / "host1").mkdir()
    (tmp_path / "host1" / "index").write_text("in the way")

    def start(rank: int) -> str:
        data = replace(remote, cache_folder=str(tmp_path / f"host{rank}"))
        with pytest.raises(DataError) as caught:
            open_shards([server.url("{00..15}.tar")], data, ranks=Ranks(rank, 2, lambda own: hosts.gather(rank, own)))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    assert first == second and first.startswith("data.cache_folder cannot be made")


def test_what_another_host_knows_is_not_fetched_again(server, remote, tmp_path) -> None:
    open_shards([server.url("{00..15}.tar")], replace(remote, cache_folder=str(tmp_path / "host1")))
    before, hosts = sum(server.requests.values()), Hosts(2)

    def start(rank: int) -> int:
        data = replace(remote, cache_folder=str(tmp_path / f"host{rank}"))
        ranks = Ranks(rank, 2, lambda own: hosts.gather(rank, own))
        return sum(shard.count for shard in open_shards([server.url("{00..15}.tar")], data, ranks=ranks))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, range(2))) == [SHARDS * SAMPLES] * 2
    assert sum(server.requests.values()) == before


def test_a_host_without_room_stops_the_run_instead_of_losing_data(make_loader, server, remote) -> None:
    remote.fetch_attempts = 2
    loader = make_loader(server.url("{00..15}.tar"))
    remote.cache_limit_bytes = 2 * (server.folder / "00.tar").stat().st_size
    for copy in (Path(remote.cache_folder) / "shards").glob("*.tar"):
        copy.unlink()
    with pytest.raises(DataError, match=r"data\.cache_limit_bytes = \d+ is too small"):
        take(loader, 60)


def test_a_wrong_host_is_told_after_some_shards(make_loader, remote) -> None:
    remote.fetch_attempts = 1
    with pytest.raises(DataError, match=r"data\.train: 8 of the first 8 shards cannot be had: http://127\.0\.0\.1:9/"):
        make_loader("http://127.0.0.1:9/{000..999}.tar")


def test_a_shard_that_was_out_of_reach_at_the_start_stays_out(make_loader, server, remote) -> None:
    remote.fetch_attempts = 1
    away = (server.folder / "07.tar").rename(server.folder / "away")
    url = server.url("{00..15}.tar")
    loader = make_loader(url)
    (gone,) = [shard.url for shard in loader.shards[0] if shard.out_of_reach]
    away.rename(server.folder / "07.tar")
    shards = open_shards([url], remote, left_out=[gone])
    assert [shard.count for shard in shards] == [shard.count for shard in loader.shards[0]]
    assert sum(shard.count for shard in open_shards([url], remote)) == SHARDS * SAMPLES


def test_a_slow_path_that_was_written_anew_is_copied_anew(server, remote) -> None:
    """Tars are padded to 10,240 bytes: the size says little."""
    remote.cache, path = "always", server.folder / "00.tar"
    (shard,) = open_shards([str(path)], remote)
    write_tar(path, [text_sample(1, "fresh")] + [text_sample(n) for n in range(1, SAMPLES)])
    (again,) = open_shards([str(path)], remote)
    assert ShardReader(1, remote).members(shard, 0).key == "000000"
    assert ShardReader(1, remote).members(again, 0).key == "fresh"


def test_slow_paths_are_read_from_copies(make_loader, server, remote) -> None:
    pattern = str(server.folder / "{00..15}.tar")
    expected = take(make_loader(pattern), 20)
    remote.cache = "always"
    loader = make_loader(pattern)
    take(loader, 20)
    for path in server.folder.glob("*.tar"):
        written = path.stat().st_mtime_ns
        path.write_bytes(bytes(path.stat().st_size))  # no longer read
        os.utime(path, ns=(written, written))
    for (batch, _), (its, _) in zip(take(loader, 20), expected, strict=True):
        assert_same_batch(batch, its)


def test_a_pipe_needs_permission(make_loader, server, remote) -> None:
    command = f"pipe:cat {server.folder}/{{00..15}}.tar"
    with pytest.raises(DataError, match=r"data\.allow_pipe"):
        make_loader(command)
    remote.allow_pipe = True
    expected = take(make_loader(str(server.folder / "{00..15}.tar")), 10)
    for (batch, _), (its, _) in zip(take(make_loader(command), 10), expected, strict=True):
        assert batch.keys == its.keys


def test_a_stall_is_told_with_its_place(make_loader, server, remote) -> None:
    remote.fetch_timeout_s, remote.stall_s, remote.streams = 2.5, 0.5, 1
    remote.cache_limit_bytes = 4 * (server.folder / "00.tar").stat().st_size
    loader: Loader = make_loader(server.url("{00..15}.tar"), batch_size=1)
    for name in list(server.requests):
        server.faults[name] = [Fault()] * server.requests[name] + [Fault(sends=600, then="stall")]
    stalls: list[Stall] = []
    batches = loader.batches(loader.initial_state(), stalled=stalls.append)
    began = time.monotonic()
    try:
        while not stalls and time.monotonic() - began < 60:
            next(batches)
    finally:
        batches.close()
    assert stalls[0].place == "fetching" and stalls[0].detail.endswith(".tar")
    assert 0.4 < stalls[0].waited_s < 0.6 and "fetching" in str(stalls[0])
    assert Counter(thread.name.rpartition("-")[0] for thread in threading.enumerate())["cmpt-data"] == 0


def test_closing_ends_at_once_though_nothing_can_be_fetched(make_loader, server, remote) -> None:
    """Neither is another shard tried for the batch in hand, nor are shards counted as lost."""
    remote.fetch_timeout_s, remote.streams = 60.0, 2
    loader: Loader = make_loader(server.url("{00..15}.tar"), batch_size=2)
    order = SourceOrder(3, 0, [SAMPLES] * SHARDS, 2)
    first = {f"{order.stretch(stream, (0, 0)).unit:02d}.tar" for stream in range(2)}
    for name in list(server.requests):
        server.faults[name] = [Fault()] * server.requests[name] + [Fault(sends=600, then="stall")] * 9
    for copy in (Path(remote.cache_folder) / "shards").glob("*.tar"):
        if copy.name.rpartition("-")[2] not in first:
            copy.unlink()
    batches = loader.batches(loader.initial_state())
    for _ in range(SAMPLES - 2):
        next(batches)
    time.sleep(1)  # until the loader waits for a shard that does not come
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cmpt-")]
