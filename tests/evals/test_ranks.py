"""A suite in a run of two processes at ZeRO stage 3, and by tools/evaluate.py with 1, 2 and 4 processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli
from data.making_eval_sets import label_samples, write_captioned, write_choices, write_labelled, write_split
from test_train import RECIPE, overrides, rows

SUITE = """\
rows:
  source: "a table of ours"
  values:
    CLIP: {labels: 50.0, probe: 60.0, captions/text_to_image_r1: 10.0}
tasks:
  - {name: labels, kind: zero_shot, path: labels}
  - {name: captions, kind: retrieval, path: captions}
  - {name: probe, kind: linear_probe, path: labels}
  - {name: questions, kind: composition, path: questions}
  - {name: gone, kind: zero_shot, path: gone}
"""
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No number of samples divides by ranks or batches, and one set is smaller than the world."""
    folder = tmp_path_factory.mktemp("sets")
    write_labelled(folder / "labels", label_samples(11))
    write_split(folder / "labels" / "train", label_samples(13, first=20))
    write_captioned(folder / "captions", [[f"picture {n} {k}" for k in range(1 + n % 3)] for n in range(9)])
    questions = [(f"{'x' * (n + 1)}.jpg", f"a picture {n}", f"picture {n} of a dog") for n in range(3)]
    write_choices(folder / "questions", {"swap_obj": questions, "add_att": questions[:1]})
    (folder / "suite.yaml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def run(sets: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli) -> Path:
    """Eight steps of two processes with sharded weights; the suite after four and at the end."""
    folder = tmp_path_factory.mktemp("runs")
    suite = [f"evaluation.suite={sets}/suite.yaml", f"evaluation.suite_folder={sets}", "evaluation.batch_size=2"]
    more = ["run.duration=8 steps", "evaluation.every=4 steps", "engine.zero_stage=3"]
    command = [*TORCHRUN, "2", "cmpt/train.py", RECIPE, *overrides(folder, "run", *more, *suite)]
    done = run_cli(command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder / "run"


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if not key.endswith(("seconds", "_s"))}


def evaluated(world: int, run: Path, sets: Path, out: Path, run_cli: RunCli) -> dict[str, dict[str, float]]:
    launcher = [*TORCHRUN, str(world)] if world > 1 else ["python"]
    command = [*launcher, "tools/evaluate.py", str(run), "evaluation.batch_size=2", "--suite", str(sets / "suite.yaml")]
    done = run_cli([*command, "--data", str(sets), "--out", str(out)], env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out: gone: ") == 1, done.stdout
    found = json.loads(out.read_text())["results"]
    return {task: without_times(results) for task, results in found.items()}


@pytest.mark.multiprocess
def test_a_run_reports_its_tasks_and_how_long_training_stood_still(run: Path) -> None:
    evaluations = rows(run, "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [4, 8]
    for row in evaluations:
        parts = sum(row[f"{task}/seconds"] for task in ("labels", "captions", "probe", "questions"))
        assert 0 < parts <= row["seconds"]
        assert (row["labels/samples"], row["labels/classes"], row["probe/train_samples"]) == (11, 3, 13)
        assert (row["captions/images"], row["captions/texts"], row["questions/samples"]) == (9, 18, 4)
    warnings = [event["text"] for event in rows(run, "events.jsonl") if event["kind"] == "warning"]
    assert [text for text in warnings if "gone" in text and "left out" in text]
    assert "Evaluation curves" in (run / "report.html").read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_results_of_one_and_of_the_run(
    world: int, run: Path, sets: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """Bit for bit: parts do not depend on the ranks. The run itself had its weights in pieces."""
    alone = evaluated(1, run, sets, tmp_path / "alone.json", run_cli)
    assert evaluated(world, run, sets, tmp_path / "together.json", run_cli) == alone
    last = without_times(rows(run, "evaluations.jsonl")[-1])
    assert {key: value for key, value in last.items() if "/" in key} == {
        f"{task}/{key}": value for task, results in alone.items() for key, value in results.items()
    }


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_broken_image_ends_all_processes_with_its_name(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    samples = label_samples(5)
    samples[3]["jpg"] = samples[3]["jpg"][:200]
    write_labelled(tmp_path / "labels", samples)
    (tmp_path / "suite.yaml").write_text("tasks:\n  - {name: labels, kind: zero_shot, path: labels}\n")
    command = [*TORCHRUN, "2", "tools/evaluate.py", str(run), "evaluation.batch_size=2"]
    done = run_cli([*command, "--suite", str(tmp_path / "suite.yaml"), "--data", str(tmp_path)])
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "test/0.tar/s0000003.jpg" in done.stderr
