from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import RunCli, unused_port

SCRIPT = "tests/engine/curve_matrix.py"


def curves(run_cli: RunCli, world: int) -> dict[str, dict[str, Any]]:
    command = ["torchrun", "--nproc-per-node", str(world), "--master-port", str(unused_port()), SCRIPT]
    done = run_cli(command, env={"OMP_NUM_THREADS": "1"}, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fifty_steps_of_the_quickstart_agree_at_every_world_size_and_stage(run_cli: RunCli) -> None:
    """Invariant 2: with and without gradient caching, both losses, against one process at stage 0; fp32."""
    found = {world: curves(run_cli, world) for world in (1, 2, 4)}
    worst = {}
    for world, cases in found.items():
        assert len(cases) == 2 * 4 * 2
        for case, ours in cases.items():
            reference = found[1][f"{case.split()[0]} stage=0 cached=False"]
            assert ours["digests"] == reference["digests"], f"{case} at {world} processes"
            pairs = zip(ours["losses"], reference["losses"], strict=True)
            worst[f"{case} at {world} processes"] = max(abs(a - b) / b for a, b in pairs)
    print(json.dumps(worst, indent=1))
    assert max(worst.values()) < 1e-4, worst
