from __future__ import annotations

import json

import pytest
from conftest import RunCli

SCRIPT = "tests/engine/gradient_matrix.py"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"), [(2, "third"), *(pytest.param(world, "all", marks=pytest.mark.slow) for world in (1, 2, 4))]
)
def test_the_gradient_before_the_optimizer_is_that_of_the_global_loss(
    world: int, cases: str, run_cli: RunCli, free_port: int
) -> None:
    """Every ZeRO stage, offloaded too; with and without gradient caching and holes; both losses (fp32)."""
    command = ["torchrun", "--nproc-per-node", str(world), "--master-port", str(free_port), SCRIPT, cases]
    done = run_cli(command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len(found) == 2 * 2 * 7 * (3 if cases == "all" else 1)
    wrong = {case: apart for case, apart in found.items() if max(apart.values()) > 1e-5}
    assert not wrong
