"""`python -m cmpt.recipe`, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
run:
  duration: 10 steps
data:
  train:
    - urls: [a.tar]
tokenizer: {path: t.model}
model: {preset: ViT-B-16}
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cmpt.recipe", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def recipe_in(folder: Path) -> str:
    for name in ("a.tar", "t.model"):
        (folder / name).write_bytes(b"")
    (folder / "good.yaml").write_text(GOOD)
    return "good.yaml"


def test_a_good_recipe_is_printed_with_origins_and_exits_0(tmp_path: Path) -> None:
    result = command(tmp_path, recipe_in(tmp_path), "optimizer.lr=1e-3", "--world-size", "4", "run.seed=3")
    assert (result.returncode, result.stderr) == (0, "")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert rows["run.duration"].split()[1:] == ['"10', 'steps"', "good.yaml:2"]
    assert rows["optimizer.lr"].split()[1:] == ["0.001", "command", "line"]
    assert rows["run.seed"].split()[1:] == ["3", "command", "line"]
    assert rows["model.vision.width"].split()[1:] == ["768", "preset", "ViT-B-16"]
    assert rows["image.size"].split()[1:] == ["224", "schema", "default"]
    assert len({line.rindex("schema default") for line in rows.values() if "schema default" in line}) == 1, "aligned"


def test_what_cannot_run_is_printed_too_and_exits_1(tmp_path: Path) -> None:
    result = command(tmp_path, recipe_in(tmp_path), "run.seed=-1", "data.train.0.urls=[b.tar]", "--world-size=3")
    assert result.returncode == 1
    assert "run.seed" in result.stdout
    assert result.stderr.splitlines() == [
        "fault: run.seed = -1: must be >= 0 (command line)",
        "fault: data.streams = 8: must be a multiple of the number of processes = 3 (schema default)",
        'fault: data.train.0.urls = "b.tar": no such file: b.tar; give your own: data.train.0.urls=[...] '
        "(command line)",
    ]


def test_what_cannot_be_read_gives_one_line_per_fault_and_exits_1(tmp_path: Path) -> None:
    result = command(tmp_path, recipe_in(tmp_path), "masking.ration=0.3", "run.seed=x", "foo")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        'fault: bad override "foo": expected key=value (command line)',
        'fault: run.seed = "x": expected a whole number (command line)',
        "fault: masking.ration = 0.3: unknown key; did you mean masking.ratio? (command line)",
    ]


def test_help_and_wrong_usage(tmp_path: Path) -> None:
    result = command(tmp_path, "--help")
    assert result.returncode == 0 and "key=value" in result.stdout and "--world-size" in result.stdout
    assert command(tmp_path).returncode == 2
    assert command(tmp_path, "good.yaml", "--world-size", "0").returncode == 2
