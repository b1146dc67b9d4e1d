from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import RunCli, unused_port

SCRIPT = "tests/engine/elastic_matrix.py"


def start(run_cli: RunCli, world: int, folder: Path, *more: str) -> dict[str, float]:
    launcher = ["torchrun", "--nproc-per-node", str(world), "--master-port", str(unused_port())]
    done = run_cli([*(launcher if world > 1 else ["python"]), SCRIPT, str(folder), *more], timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.multiprocess
def test_a_checkpoint_of_one_or_two_ranks_goes_on_at_another_world_size_and_stage(
    run_cli: RunCli, tmp_path: Path
) -> None:
    """Every stage is saved and resumed in both directions; the next ten losses and the average of the weights agree."""
    start(run_cli, 1, tmp_path, "save")
    found = start(run_cli, 2, tmp_path, "save", "covering", "1")
    found |= start(run_cli, 1, tmp_path, "covering", "2")
    assert len(found) == 8
    assert {case: apart for case, apart in found.items() if not apart < 1e-4} == {}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_all_144_changes_of_world_size_and_stage(run_cli: RunCli, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        start(run_cli, world, tmp_path, "save")
    found: dict[str, float] = {}
    for world in (1, 2, 4):
        found |= start(run_cli, world, tmp_path, "1,2,4")
    worst = max(found, key=lambda case: found[case])
    print(f"largest relative difference {found[worst]:.2e}: {worst}")  # shown with -s
    assert len(found) == 144
    assert {case: apart for case, apart in found.items() if not apart < 1e-4} == {}
