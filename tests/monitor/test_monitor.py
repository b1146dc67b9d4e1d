import io
import json
import sys
from pathlib import Path

import pytest

from cmpt.monitor.monitor import Monitor
from cmpt.monitor.records import METRIC_KEYS, read_records


def train(folder: Path, start: int, end: int, total: int = 100) -> None:
    """Steps start+1 … end; logs every 5, evaluates every 20."""
    with Monitor(folder, "toy", total, start) as monitor:
        for step in range(start + 1, end + 1):
            if step % 7 == 0:
                monitor.event("skip", step, cause="broken_image", key=f"a.tar/{step}")
            if step % 5 == 0:
                monitor.log({"step": step, "loss": 1 / step, "phase": "main"})
            if step % 20 == 0:
                monitor.evaluation(step, {"image_to_text_r10": step / 100, "pairs": 50})
                monitor.checkpoint(step, f"checkpoints/step_{step:08d}")


def test_resumed_run_joins_without_gap_or_repeat(tmp_path: Path) -> None:
    train(tmp_path, 0, 57)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 60, "samp')
    train(tmp_path, 40, 100)
    assert [row["step"] for row in read_records(tmp_path / "metrics.jsonl")] == list(range(5, 101, 5))
    assert [row["step"] for row in read_records(tmp_path / "evaluations.jsonl")] == [20, 40, 60, 80, 100]
    events = read_records(tmp_path / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "skip"] == list(range(7, 100, 7))
    assert [event["kind"] for event in events if event["kind"] in ("start", "resume", "end")] == [
        "start",
        "end",
        "resume",
        "end",
    ]
    assert [event["outcome"] for event in events if event["kind"] == "end"] == ["stopped", "finished"]
    assert tuple(read_records(tmp_path / "metrics.jsonl")[0]) == METRIC_KEYS


def test_start_from_zero_over_a_killed_run_repeats_nothing(tmp_path: Path) -> None:
    with Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.evaluation(0, {"pairs": 5})
        monitor.log({"step": 5})
    with Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.evaluation(0, {"pairs": 5})
        monitor.log({"step": 5})
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1
    assert len(read_records(tmp_path / "evaluations.jsonl")) == 1


def test_tensorboard_curves_do_not_overlap_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, 0, 57)
    train(tmp_path, 40, 100)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == list(range(5, 101, 5))
    assert [point.step for point in curves.Scalars("eval/image_to_text_r10")] == [20, 40, 60, 80, 100]


def test_inactive_monitor_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(tmp_path / "run", "toy", 10, 0, active=False) as monitor:
        monitor.log({"step": 1})
        monitor.event("skip", 1)
        monitor.evaluation(1, {})
        monitor.checkpoint(1, "c")
        monitor.picture("masks", b"png")
        monitor.note("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(KeyboardInterrupt, "interrupted"), (RuntimeError, "stopped by RuntimeError"), (SystemExit, "stopped")],
)
def test_the_way_a_run_ends_is_recorded(tmp_path: Path, error: type[BaseException], outcome: str) -> None:
    with pytest.raises(error), Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.log({"step": 5})
        raise error()
    last = read_records(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["step"], last["outcome"]) == ("end", 5, outcome)


def test_not_finite_loss_is_logged_as_valid_json(tmp_path: Path) -> None:
    with Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.log({"step": 5, "loss": float("nan")})
    (row,) = read_records(tmp_path / "metrics.jsonl")
    assert row["loss"] is None and row["not_finite"] == {"loss": "nan"}


def test_picture_replaces_the_earlier_one(tmp_path: Path) -> None:
    with Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.picture("masks", b"first")
        monitor.picture("masks", b"second")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["masks.png"]
    assert (tmp_path / "pictures" / "masks.png").read_bytes() == b"second"


def test_log_refuses_a_row_without_a_step(tmp_path: Path) -> None:
    with Monitor(tmp_path, "toy", 10, 0) as monitor, pytest.raises(ValueError, match="step"):
        monitor.log({"loss": 1.0})


def test_warning_is_shown_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    with Monitor(tmp_path, "toy", 10, 0) as monitor:
        monitor.event("warning", 3, text="no sample was usable")
    assert "step 3: warning: no sample was usable" in shown.getvalue()
    assert json.loads((tmp_path / "events.jsonl").read_bytes().splitlines()[1])["text"] == "no sample was usable"
