import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmpt.monitor.records import METRIC_KEYS, RecordWriter, metrics_row, read_records, to_line, trim_after


def write(path: Path, *records: dict) -> None:
    writer = RecordWriter(path)
    for record in records:
        writer.append(record)
    writer.close()


def test_floats_keep_every_digit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": float(np.float32(1 / 3)), "d": np.float64(2 / 3), "e": np.int64(2**60)}
    write(tmp_path / "m.jsonl", values)
    assert read_records(tmp_path / "m.jsonl") == [{key: value for key, value in values.items()}]


def test_not_finite_values_are_null_and_named() -> None:
    line = to_line({"loss": float("nan"), "grads": {"image": float("-inf"), "text": 1.0}, "unknown": None})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "loss": None,
        "grads": {"image": None, "text": 1.0},
        "unknown": None,
        "not_finite": {"loss": "nan", "grads.image": "-inf"},
    }


def test_metrics_row_has_every_key_in_order_and_refuses_others() -> None:
    row = metrics_row({"loss": 1.0, "step": 3})
    assert tuple(row) == METRIC_KEYS
    assert row["step"] == 3 and row["lr"] is None
    with pytest.raises(ValueError, match="'los'"):
        metrics_row({"step": 1, "los": 1.0})


def test_trim_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *({"step": step, "loss": step / 7} for step in range(10, 60, 10)))
    untouched = path.read_bytes().splitlines(keepends=True)[:3]
    with open(path, "ab") as file:
        file.write(b'{"step": 60, "lo')
    assert trim_after(path, 30) == 2
    assert path.read_bytes().splitlines(keepends=True) == untouched
    assert list(tmp_path.iterdir()) == [path]


def test_trim_leaves_a_clean_file_alone_and_no_file_absent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert trim_after(path, 3) == 0 and not path.exists()
    write(path, {"step": 1})
    before = path.stat().st_ino
    assert trim_after(path, 1) == 0 and path.stat().st_ino == before


def test_trim_of_kinds_keeps_all_other_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(
        path,
        {"kind": "skip", "step": 5},
        {"kind": "skip", "step": 25},
        {"kind": "warning", "step": 25},
        {"kind": "end", "step": 30},
    )
    assert trim_after(path, 20, frozenset({"skip"})) == 1
    assert [record["kind"] for record in read_records(path)] == ["skip", "warning", "end"]


def test_torn_last_line_is_not_read_but_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\x00\x00\x00\x00')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_records(path)


def test_every_line_is_whole_after_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path; from cmpt.monitor.records import RecordWriter\n"
        "writer = RecordWriter(Path(sys.argv[1])); step = 0\n"
        "while True:\n"
        "    step += 1; writer.append({'step': step, 'text': 'x' * 3000})\n"
        "    if step == 200: print('ready', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert path.read_bytes().endswith(b"\n")
    steps = [record["step"] for record in read_records(path)]
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1))
