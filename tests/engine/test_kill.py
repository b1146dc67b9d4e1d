from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import RunCli

SCRIPT = "tests/engine/killed_saves.py"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kills", "kills_of_two_ranks"), [(8, 3), pytest.param(100, 30, marks=pytest.mark.slow, id="100-30")]
)
def test_after_a_kill_at_any_moment_of_a_save_the_run_resumes_bit_by_bit(
    kills: int, kills_of_two_ranks: int, run_cli: RunCli, tmp_path: Path
) -> None:
    """Weights, moments, their average and the state; with a second folder. One of two ranks is also killed alone."""
    seed = random.SystemRandom().randrange(2**32)
    numbers = [str(number) for number in (kills, kills_of_two_ranks, seed)]
    done = run_cli(["python", SCRIPT, str(tmp_path), *numbers], timeout=300 + 10 * (kills + kills_of_two_ranks))
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    print(found)  # shown with -s
    for world, expected in (("1", kills), ("2", kills_of_two_ranks)):
        assert sum(found[world]["phases"].values()) - found[world]["phases"].get("nothing is written", 0) == expected
    assert max(found["1"]["resumed"]) > 1, "no start has resumed"
    phases = {*found["1"]["phases"], *found["2"]["phases"]}
    assert len(phases) >= (8 if kills >= 100 else 3), phases
