"""The cache of shards: its limit, and processes that die or meet in one folder."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data.caching import ATTEMPTS, command_lines, make_shard, own_files, until
from data.flaky_server import Fault

from cmpt.data.cache import FetchError, ShardCache, default_backoff, file_digest
from cmpt.data.opener import HostError
from cmpt.data.validate import DataError
from cmpt.recipe import schema


class Processes:
    """Talks to cache_processes.py."""

    def __init__(self, folder: Path) -> None:
        program = [sys.executable, str(Path(__file__).with_name("cache_processes.py"))]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        self._program = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._folder = folder

    def ask(self, **job) -> int:
        assert self._program.stdin is not None and self._program.stdout is not None
        print(json.dumps(job), file=self._program.stdin, flush=True)
        return int(self._program.stdout.readline())

    def start(self, urls: list[str], output: Path, limit_bytes: int = 10_000_000, threads: int = 1) -> int:
        folder = str(self._folder)
        return self.ask(folder=folder, limit_bytes=limit_bytes, urls=urls, threads=threads, output=str(output))

    def wait(self, process: int) -> int:
        return self.ask(wait=process)

    def end(self) -> None:
        self._program.kill()
        self._program.communicate()

    def use(self, folder: Path) -> Processes:
        self._folder = folder
        return self


@pytest.fixture(scope="module", autouse=True)  # its start takes seconds: it goes on beside the first tests
def forking_program() -> Iterator[Processes]:
    processes = Processes(Path())
    yield processes
    processes.end()


@pytest.fixture
def processes(forking_program: Processes, folder: Path) -> Processes:
    return forking_program.use(folder)


def total_bytes(folder: Path) -> int:
    """What lies in the folder at one moment: it is not another one at the last file than at the first."""
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return sum(path.stat().st_size for path in own_files(folder))


def test_a_finished_file_of_another_size_is_fetched_anew(server, make_cache) -> None:
    old = make_shard(server.folder / "s.tar", 1)
    cache = make_cache()
    held = cache.hold(server.url("s.tar"))
    new = make_shard(server.folder / "s.tar", 2, size=50_000)
    with pytest.raises(FetchError, match=f"in use under this URL: {len(old)} bytes, the index says {len(new)}"):
        cache.hold(server.url("s.tar"), len(new))
    held.close()
    os.truncate(held.path, 512)  # as a power cut may leave it
    assert cache.hold(server.url("s.tar"), len(new)).path.read_bytes() == new


def test_a_shard_is_fetched_once(server, make_cache) -> None:
    whole, cache = make_shard(server.folder / "s.tar", 1, size=300_000), make_cache()
    server.bytes_per_s = 3e6
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(cache.hold, [server.url("s.tar")] * 8))
    assert {shard.path.read_bytes() for shard in shards} == {whole}
    assert make_cache().hold(server.url("s.tar")).path == shards[0].path
    assert server.requests["s.tar"] == 1


def test_two_processes_fetch_a_shard_once(server, processes, tmp_path, folder) -> None:
    make_shard(server.folder / "s.tar", 1, size=300_000)
    server.bytes_per_s = 3e6
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    running = [processes.start([server.url("s.tar")], output) for output in outputs]
    assert [processes.wait(process) for process in running] == [0, 0]
    digest = file_digest(server.folder / "s.tar")
    assert [json.loads(output.read_text()) for output in outputs] == [{server.url("s.tar"): [digest]}] * 2
    assert server.requests["s.tar"] == 1


def test_who_waited_for_a_fetch_that_failed_does_not_begin_again(server, make_cache) -> None:
    cache = make_cache(waits=lambda attempt: 0.1)

    def hold(_: int) -> str:
        with pytest.raises(FetchError) as caught:
            cache.hold(server.url("none.tar"))
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(hold, range(4)))) == 1
    assert server.requests["none.tar"] == ATTEMPTS


@pytest.mark.parametrize("seed", [0, 1])
def test_the_limit_holds_at_every_moment(server, processes, tmp_path, folder, make_cache, seed) -> None:
    shards = {f"{number}.tar": make_shard(server.folder / f"{number}.tar", number) for number in range(10)}
    for number in range(0, 10, 3):
        server.faults[f"{number}.tar"] = [Fault(sends=20_000)]
    server.bytes_per_s = 20e6
    make_cache()  # makes the folder
    limit_bytes = 5 * len(shards["0.tar"])  # of 4 threads each has one in use, or is fetching it
    urls = [server.url(name) for name in shards]
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    highest, samples, ended = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal highest, samples
        while not ended.wait(0.001):
            highest, samples = max(highest, total_bytes(folder)), samples + 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    running = [processes.start(urls, output, limit_bytes, threads=2) for output in outputs]
    statuses = [processes.wait(process) for process in running]
    ended.set()
    watcher.join()
    expected = {server.url(name): [file_digest(server.folder / name)] for name in shards}
    assert statuses == [0, 0]
    assert [json.loads(output.read_text()) for output in outputs] == [expected] * 2
    assert limit_bytes * 0.8 <= highest <= limit_bytes
    assert samples > 50
    assert sum(server.requests.values()) > len(shards) + 4  # there was not room for all of them


def test_held_shards_are_not_evicted_and_those_used_last_stay_longest(server, make_cache, folder) -> None:
    shards = [make_shard(server.folder / f"{number}.tar", number) for number in range(6)]
    cache = make_cache(limit_bytes=3 * len(shards[0]))
    cache.hold(server.url("0.tar")).close()
    held = cache.hold(server.url("0.tar"))  # found there, whereas the next ones are held as they come
    for number in (1, 2, 1, 3, 4, 3, 5):  # 2, 1 and 4 have to go
        cache.hold(server.url(f"{number}.tar")).close()
    assert held.path.read_bytes() == shards[0]
    names = {path.name.partition("-")[2] for path in own_files(folder)}
    assert names == {"0.tar", "3.tar", "5.tar"}


def test_a_hold_ends_with_the_last_reference_to_it(server, make_cache, folder) -> None:
    size = len(make_shard(server.folder / "0.tar", 0))
    make_shard(server.folder / "1.tar", 1)
    cache = make_cache(limit_bytes=size)
    held = cache.hold(server.url("0.tar"))
    with pytest.raises(HostError, match="too small"):
        cache.hold(server.url("1.tar"))
    del held
    gc.collect()
    assert cache.hold(server.url("1.tar")).size == size


@pytest.mark.parametrize("stated", [False, True], ids=["size unknown", "size stated"])
def test_a_limit_that_is_too_small_says_what_is_held(server, make_cache, folder, stated) -> None:
    size = len(make_shard(server.folder / "0.tar", 0))
    make_shard(server.folder / "1.tar", 1)
    cache = make_cache(limit_bytes=2 * size - 1)
    with cache.hold(server.url("0.tar")) as held:
        needs = size if stated else r"\d+"
        message = rf"data\.cache_limit_bytes = {2 * size - 1} is too small: this shard needs {needs} bytes, "
        message += f"1 shards in use have {size}, 0 others being fetched 0"
        with pytest.raises(HostError, match=r"1\.tar: " + message):
            cache.hold(server.url("1.tar"), size if stated else None)
        assert own_files(folder) == [held.path]
    assert server.requests["1.tar"] == (0 if stated else ATTEMPTS)
    with pytest.raises(
        HostError,
        match=rf"^[^ ]*1\.tar: data\.cache_limit_bytes = .* this shard needs {10 * size} bytes, 0 shards in use",
    ):
        cache.hold(server.url("1.tar"), 10 * size)
    assert own_files(folder) == [held.path]  # nothing is evicted in vain
    assert cache.hold(server.url("1.tar")).size == size


def test_room_that_another_fetch_has_is_waited_for(server, make_cache) -> None:
    size = len(make_shard(server.folder / "0.tar", 0, size=200_000))
    make_shard(server.folder / "1.tar", 1, size=200_000)
    cache = make_cache(limit_bytes=size + 1000, attempts=100)
    server.bytes_per_s = 1e6
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: cache.hold(server.url(name), size).close(), ["0.tar", "1.tar"]))
    assert sum(server.requests.values()) == 2


def test_a_fetch_takes_no_room_while_it_waits_for_its_next_attempt(server, make_cache) -> None:
    size = len(make_shard(server.folder / "0.tar", 0))
    make_shard(server.folder / "1.tar", 1)
    server.faults["0.tar"] = [Fault(sends=9000)]
    failed, may_go_on = threading.Event(), threading.Event()

    def wait(attempt: int) -> float:
        failed.set()
        may_go_on.wait(5)
        return 0

    cache = make_cache(limit_bytes=size, waits=wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.hold, server.url("0.tar"), size)
        assert failed.wait(5)
        make_cache(limit_bytes=size, attempts=1).hold(server.url("1.tar"), size).close()
        may_go_on.set()
        assert first.result().size == size


def test_what_a_dead_fetch_left_is_evicted_first_and_never_taken_for_whole(server, make_cache, folder) -> None:
    whole = make_shard(server.folder / "0.tar", 0)
    make_shard(server.folder / "1.tar", 1)
    cache = make_cache(limit_bytes=3 * len(whole))
    for name in ("0.tar", "1.tar"):
        with cache.hold(server.url(name)) as held:
            part = held.path
        part.rename(part.with_name(f"{part.name[:32]}.part"))
    assert cache.hold(server.url("0.tar")).path.read_bytes() == whole
    assert server.requests["0.tar"] == 2
    make_shard(server.folder / "2.tar", 2, size=50_000)
    cache.hold(server.url("2.tar"))
    assert [path.name.partition("-")[2] for path in own_files(folder) if path.suffix == ".part"] == []


def test_killed_fetches_leave_nothing_that_is_taken_for_whole(server, processes, make_cache, folder, tmp_path) -> None:
    draws = random.Random(5)
    server.bytes_per_s = 1e6  # 0.1 s for a shard, which a kill within 0.08 s interrupts on a fast machine too
    finished = 0
    for number in range(16):
        name = f"{number % 8}.tar"  # every shard twice: the second fetch takes over what the first one left
        whole = make_shard(server.folder / name, number % 8, size=100_000)
        process = processes.start([server.url(name)], tmp_path / "output.json")
        time.sleep(draws.uniform(0, 0.08))
        os.kill(process, signal.SIGKILL)
        finished += processes.wait(process) == 0
        for path in own_files(folder):
            assert path.suffix == ".part" or path.read_bytes() == (server.folder / path.name[33:]).read_bytes()
        if number >= 8:
            assert make_cache().hold(server.url(name), len(whole)).path.read_bytes() == whole
    assert 16 - finished >= 10
    assert [path.suffix for path in own_files(folder)] == [".tar"] * 8


def test_names_in_the_folder_come_from_no_url(server, make_cache, folder) -> None:
    make_shard(server.folder / "s.tar", 1)
    cache = make_cache(allow_pipe=True)
    urls = [server.url(f"x/../s.tar{query}") for query in ("", "?signature=secret/../../x", "#/..", "?" + "y" * 400)]
    urls += [f"pipe:cat {server.folder}/s.tar #{end}" for end in ("/../../..", "/" + "z" * 300, "/a\0b.part", "/lock")]
    for url in urls:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cmpt.data.opener._command", lambda *_: (["cat", f"{server.folder}/s.tar"], "cat"))
            path = cache.hold(url).path
        assert path.parent == folder and re.fullmatch(r"[0-9a-f]{32}-[A-Za-z0-9._-]{0,100}", path.name)
    assert len(own_files(folder)) == len(urls)
    assert not [path for path in own_files(folder) if "secret" in path.name]


def test_files_of_others_are_neither_counted_nor_evicted(server, make_cache, folder) -> None:
    size = len(make_shard(server.folder / "s.tar", 1))
    folder.mkdir()
    (folder / "my-only-copy.tar").write_bytes(bytes(10 * size))
    (folder / "sub").mkdir()
    make_shard(server.folder / "t.tar", 2)
    cache = make_cache(limit_bytes=size)
    for name in ("s.tar", "t.tar"):
        cache.hold(server.url(name)).close()
    names = {path.name.partition("-")[2] for path in own_files(folder)}
    assert names == {"only-copy.tar", "t.tar", ""}


def test_shards_are_fetched_ahead(server, make_cache, folder) -> None:
    cache = make_cache()
    for number in range(5):
        make_shard(server.folder / f"{number}.tar", number)
        for _ in range(3):
            cache.ahead(server.url(f"{number}.tar"))
    assert sum(thread.name == "cmpt-fetch" for thread in threading.enumerate()) == 2
    until(lambda: sum(path.suffix == ".tar" for path in own_files(folder)) == 5)
    for number in range(5):
        cache.hold(server.url(f"{number}.tar"))
        assert server.requests[f"{number}.tar"] == 1


def test_fetching_ahead_keeps_errors_for_hold_and_leaves_a_full_cache(server, make_cache, folder) -> None:
    size = len(make_shard(server.folder / "0.tar", 0))
    make_shard(server.folder / "1.tar", 1)
    cache = make_cache(limit_bytes=size, workers=1)
    held = cache.hold(server.url("0.tar"))
    for name in ("none.tar", "1.tar"):
        cache.ahead(server.url(name))
    cache.ahead("pipe:true")
    cache.ahead("no such path")
    until(lambda: server.requests["1.tar"] == 1)
    with pytest.raises(FetchError, match="404"):
        cache.hold(server.url("none.tar"))
    until(lambda: own_files(folder) == [held.path])
    held.close()
    cache.ahead(server.url("1.tar"))
    until(lambda: [path.name[33:] for path in own_files(folder)] == ["1.tar"])


def test_closing_ends_fetches_and_waits_at_once(server, make_cache, folder) -> None:
    names = ["stalled.tar", "missing.tar", "waited-for.tar"]
    for name in names:
        make_shard(server.folder / name, 1)
    server.faults["stalled.tar"] = server.faults["waited-for.tar"] = [Fault(sends=9000, then="stall")]
    server.faults["missing.tar"] = [Fault(status=404)] * 9
    cache = make_cache(timeout_s=60, waits=lambda attempt: 60)
    cache.ahead(server.url("waited-for.tar"))
    until(lambda: server.requests["waited-for.tar"] == 1)
    with ThreadPoolExecutor(3) as pool:
        holds = [pool.submit(cache.hold, server.url(name)) for name in names]
        until(lambda: all(server.requests[name] for name in names))
        time.sleep(0.1)
        start = time.monotonic()
        cache.close()
        for hold in holds:
            with pytest.raises(FetchError, match=r"\.tar: the fetch was ended"):
                hold.result(5)
        assert time.monotonic() - start < 1
    until(lambda: not any(line.startswith("curl") and server.url("") in line for line in command_lines()))
    assert own_files(folder) == []
    cache.ahead(server.url("stalled.tar"))
    with pytest.raises(FetchError, match="the fetch was ended"):
        cache.hold(server.url("stalled.tar"))
    assert make_cache().hold(server.url("stalled.tar")).size > 0


def test_a_removed_cache_is_made_again(server, make_cache, folder) -> None:
    whole, cache = make_shard(server.folder / "s.tar", 1), make_cache()
    for path in [*own_files(folder), folder / "lock"]:
        path.unlink()
    folder.rmdir()
    assert cache.hold(server.url("s.tar")).path.read_bytes() == whole


def test_an_unusable_folder_names_the_field(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.cache_folder cannot be made: "):
        ShardCache.of(schema.Data(cache_folder=str(tmp_path / "file")))


def test_a_disk_that_takes_no_more_is_an_error(make_cache, tmp_path, monkeypatch) -> None:
    make_shard(tmp_path / "s.tar", 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match=r"s\.tar: cannot be kept in data\.cache_folder: .*No space left"):
        make_cache().hold(str(tmp_path / "s.tar"))


def test_waits_double_up_to_a_minute() -> None:
    for attempt, least in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (5000, 60)):
        waits = [default_backoff(attempt) for _ in range(50)]
        assert least <= min(waits) < max(waits) <= least * 1.25
