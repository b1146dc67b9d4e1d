"""The benchmark of collectives: its fit, and a real run with two processes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import RunCli, unused_port

from bench_collectives import PASSES, fit_link, main, read_collectives


def test_the_fit_finds_latency_and_bandwidth() -> None:
    draw = random.Random(0)
    points = [
        {"sent_bytes": 4.0**power, "seconds": (2e-3 + 4.0**power / 1e8) * draw.uniform(0.95, 1.05)}
        for power in range(6, 14)
    ]
    latency_s, bytes_per_s, error = fit_link(points)
    assert latency_s == pytest.approx(2e-3, rel=0.05) and bytes_per_s == pytest.approx(1e8, rel=0.05)
    assert 0 < error < 0.05


def test_a_disturbed_size_does_not_bend_the_fit() -> None:
    """Another process takes a core for a moment."""
    points = [{"sent_bytes": 4.0**power, "seconds": 2e-4 + 4.0**power / 1e7} for power in range(6, 13)]
    points[4]["seconds"] *= 1.6
    latency_s, bytes_per_s, error = fit_link(points)
    assert latency_s == pytest.approx(2e-4, rel=0.2) and bytes_per_s == pytest.approx(1e7, rel=0.05)
    assert error < 0.05


def test_one_size_is_not_enough() -> None:
    with pytest.raises(ValueError, match="expected at least two sizes"):
        fit_link([{"sent_bytes": 100.0, "seconds": 1.0}] * 3)


@pytest.mark.multiprocess
def test_two_processes_measure_every_operation(tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "c.json"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(unused_port())]
    options = ["--seconds", "2", "--largest-mib", "1", "--out", str(out)]
    done = run_cli(["python", *command, "tools/bench_collectives.py", *options])
    assert done.returncode == 0, done.stderr
    found = read_collectives(out)
    assert found["world_size"] == 2 and len(found["hosts"]) == 2 and set(found["ops"]) == set(PASSES)
    for name, op in found["ops"].items():
        sizes = [point["bytes"] for point in op["points"]]
        assert sizes == [4096, 16384, 65536, 262144, 1048576]
        for point in op["points"]:
            assert 0 < point["seconds_low"] <= point["seconds"] <= point["seconds_high"]
            assert point["sent_bytes"] == PASSES[name] * point["bytes"] / 2
        assert op["bytes_per_s"] > 0 and f"| {name} | 4,096 |" in done.stdout
    assert json.loads(out.read_text()) == found


def test_a_single_process_has_nothing_to_time(run_cli: RunCli) -> None:
    done = run_cli(["python", "tools/bench_collectives.py"])
    assert done.returncode == 2 and "a single process has no collectives" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--seconds", "nan", "--seconds nan: must be above 0, and finite"),
        ("--largest-mib", "0", "--largest-mib 0: must be at least 1"),
        ("--out", "/nowhere/x.json", "--out /nowhere/x.json: there is no folder /nowhere"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_timed(
    option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([option, value])
    assert ended.value.code == 2 and told in capsys.readouterr().err
