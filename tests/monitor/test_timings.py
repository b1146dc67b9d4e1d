"""The lines that say where the time of each step went."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, RunCli

from cmpt.dist import step_clock, traffic
from cmpt.monitor.timings import Timings, wire_bytes


@dataclass(frozen=True)
class Counted:
    kept_patches: int = 30
    patches: int = 60
    text_tokens: int = 7
    flops: int = 1000


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "timings/rank_00002.jsonl").read_text().splitlines()]


def test_a_line_for_every_step_that_is_over_the_last_one_included(tmp_path: Path) -> None:
    with Timings(tmp_path, True, 2, torch.device("cpu")) as timings:
        clock = step_clock.clock()
        assert clock is not None
        for step in range(3):
            clock.at("data", step)
            clock.at("gradient", step)
            with traffic.collective("features", 64):
                pass
            timings.add(step + 1, Counted(), {"features": 64})
            assert len(lines_of(tmp_path)) == step, "a step is written when the next one has begun"
        clock.at("last checkpoint", 3)
    assert step_clock.clock() is None
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line["places"]) == {"data", "gradient"}  # type: ignore[call-overload]
        assert line["calls"] == {"gradient": {"features": 1}} and line["sent_bytes"] == {"features": 64}
        assert (line["rank"], line["flops"], line["image_tokens"], line["text_tokens"]) == (2, 1000, 30, 7)
        assert line["peak_memory_bytes"] > 2**20  # type: ignore[operator]


AHEAD = """
import functools, sys
import cmpt.train as program
program.Feed = functools.partial(program.Feed, ahead=True)
sys.exit(program.main(sys.argv[1:]))
"""


@pytest.mark.multiprocess
def test_a_step_is_one_line_where_batches_are_masked_ahead(tmp_path: Path, run_cli: RunCli) -> None:
    """As on a GPU, where the masks of the next batch are begun within a step."""
    settings = ["engine.batch_size=16", "masking.strategy=random", "model.vision.layers=1", "model.text.layers=1",
                "data.heldout=[]", "guard.dry_run=false", "run.stop_after=5 steps", "run.timings=true",
                f"run.folder={tmp_path}", "run.name=run"]  # fmt: skip
    done = run_cli(["python", "-c", AHEAD, str(REPOSITORY / "recipes/quickstart.yaml"), *settings])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/timings/rank_00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert {"data", "data ahead", "mask", "gradient", "optimizer"} <= set(line["places"])
        assert line["places"]["gradient"] > 0 and line["flops"] > 0


def test_nothing_is_measured_or_written_unless_it_is_wanted(tmp_path: Path) -> None:
    with Timings(tmp_path, False, 0, torch.device("cpu")) as timings:
        assert step_clock.clock() is None
        timings.add(1, Counted(), {})
    assert not list(tmp_path.iterdir())


def test_bytes_on_the_wire_come_from_the_kernel() -> None:
    rows = [re.split(r"[:\s]+", line.strip()) for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    alone = [row for row in rows if row[0] != "lo" and not list(Path("/sys/class/net", row[0]).glob("lower_*"))]
    before = sum(int(row[9]) for row in alone)
    assert before <= wire_bytes() < before + 10 * 2**20


def test_bytes_that_pass_two_interfaces_of_a_host_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"lo": 1000, "eth0": 200, "bond0": 200, "eth1": 30, "ib0": 50}
    rows = [f"  {name}: " + " ".join(["9"] * 8 + [str(sent)] + ["9"] * 7) for name, sent in counts.items()]
    (tmp_path / "dev").write_text("\n".join(["Inter-|", " face |", *rows]) + "\n")
    (tmp_path / "net/bond0/lower_eth0").mkdir(parents=True)
    for name, kind in (("eth1", "1"), ("ib0", "32")):
        (tmp_path / "net" / name).mkdir()
        (tmp_path / "net" / name / "type").write_text(f"{kind}\n")
    for port, count in (("1", "5\n"), ("2", "N/A\n")):
        counters = tmp_path / f"infiniband/mlx5_0/ports/{port}/counters"
        counters.mkdir(parents=True)
        (counters / "port_xmit_data").write_text(count)
    for name, path in (("_NETWORK", "dev"), ("_INTERFACES", "net"), ("_INFINIBAND", "infiniband")):
        monkeypatch.setattr(f"cmpt.monitor.timings.{name}", tmp_path / path)
    assert wire_bytes() == 230 + 4 * 5
