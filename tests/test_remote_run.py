"""The training program on shards behind a server that fails in every way, and killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunCli
from data.flaky_server import Fault, FlakyServer
from data.making import jpeg, write_tar
from data.test_remote import sizes
from test_train import TRAIN, overrides, rows, trajectory

SHARDS, SAMPLES = 16, 12


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_over_a_failing_server_is_the_run_from_local_files(tmp_path: Path, run_cli: RunCli) -> None:
    """Resets, stalls, 404, 500, 503, cuts with right, wrong and no length; a kill -9; a cache of half the shards."""
    served = tmp_path / "served"
    served.mkdir()
    for shard in range(SHARDS):
        numbers = range(SAMPLES * shard, SAMPLES * (shard + 1))
        members = [{"jpg": jpeg(n), "json": json.dumps({"captions": [f"picture {n}"]}).encode()} for n in numbers]
        write_tar(served / f"{shard:02d}.tar", [(f"s{n:04d}", it) for n, it in zip(numbers, members, strict=True)])
    size = (served / "00.tar").stat().st_size
    limit = 9 * size

    def source(pattern: str) -> str:
        return f"data.train=[{{urls: ['{pattern}']}}]"

    length = "run.duration=24 steps"
    local = run_cli([*TRAIN, *overrides(tmp_path, "local", length, source(f"{served}/{{00..15}}.tar"))])
    assert local.returncode == 0, local.stderr

    server = FlakyServer(served)
    server.faults = {
        "00.tar": [Fault(sends=size // 2, then="reset"), Fault(status=500)],
        "01.tar": [Fault(sends=size // 2, then="stall")],
        "02.tar": [Fault(status=404), Fault(status=503)],
        "03.tar": [Fault(sends=size // 2, states="nothing"), Fault(sends=size // 2)],
        "04.tar": [Fault(), Fault(sends=size // 2, states="sent"), Fault(sends=0, states="nothing")],
        "05.tar": [Fault(), Fault(body=b"<html>proxy</html>"), Fault(sends=100, then="reset")],
    }
    server.bytes_per_s = 4.0 * size  # the kill comes while shards are fetched
    cache, most, done = tmp_path / "remote_cache", [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], sizes(cache / "shards"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    more = [length, source(server.url("{00..15}.tar")), f"data.cache_limit_bytes={limit}", "data.fetch_timeout_s=1.5"]
    command = [*TRAIN, *overrides(tmp_path, "remote", *more, f"data.cache_folder={cache}")]
    run = tmp_path / "remote"
    try:
        first = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while not any((run / "checkpoints").glob("step_*")):
            assert first.poll() is None and time.monotonic() < until, "no checkpoint"
            time.sleep(0.005)
        first.kill()
        first.wait()
        second = run_cli(command)
    finally:
        done.set()
        watcher.join()
        server.close()
    assert second.returncode == 0, second.stderr
    assert trajectory(run) == trajectory(tmp_path / "local")
    assert [event["kind"] for event in rows(run, "events.jsonl")].count("resume") == 1
    assert size < most[0] <= limit
    assert all(server.requests[f"{shard:02d}.tar"] >= 1 for shard in range(SHARDS))
