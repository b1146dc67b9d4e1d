from __future__ import annotations

import json

import pytest
from conftest import RunCli

from cmpt.engine.traffic import expected_bytes

SCRIPT = "tests/engine/traffic_matrix.py"
CASES = 4 * 2 * 2 + 2 * 2 + 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_counted_bytes_are_those_that_torch_sees_and_those_of_the_arithmetic(
    world: int, run_cli: RunCli, free_port: int
) -> None:
    """Every ZeRO stage, with and without gradient caching, both losses; and holes."""
    found = run_matrix(world, run_cli, free_port)
    assert len(found) == CASES
    unseen = {case: it for case, it in found.items() if sum(it["counted"].values()) != sum(it["seen"].values())}
    assert not unseen
    for case, it in found.items():
        assert it["counted"]["parameters"] < it["seen"].get("gathers", 0), case  # the rest is features
        assert it["counted"]["gradients"] < it["seen"]["reductions"], case
    apart = {
        f"{case} {kind}": (counted, it["expected"][kind])
        for case, it in found.items()
        for kind, counted in it["counted"].items()
        if abs(counted - it["expected"][kind]) > 0.01 * it["expected"][kind]
    }
    assert not apart


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_alone_sends_nothing(run_cli: RunCli, free_port: int) -> None:
    found = run_matrix(1, run_cli, free_port)
    assert len(found) == CASES
    for it in found.values():
        assert not any(it["counted"].values()) and not any(it["expected"].values())


def test_the_zero_paper_s_volumes_are_reached_in_the_limit_of_many_ranks() -> None:
    """Section 7 of arXiv 1910.02054: stage 3 moves 1.5 times what stages 0 to 2 move, in fp32 bytes."""
    count, world = 10**8, 10**4
    sent = {
        stage: expected_bytes(
            [[count]], world_size=world, zero_stage=stage, batch_size=world, embed_dim=1, loss="sigmoid", parts=parts
        )
        for stage, parts in ((0, 1), (1, 1), (3, 2))
    }
    assert sent[0]["gradients"] == pytest.approx(2 * 4 * count, rel=1e-3) and sent[0]["parameters"] == 0
    assert sent[1]["parameters"] == pytest.approx(4 * count, rel=1e-3)
    assert sent[3]["gradients"] == pytest.approx(4 * count, rel=1e-3)
    assert sent[3]["parameters"] == pytest.approx(2 * 3 * 4 * count, rel=1e-3)  # two parts, three gathers each


def run_matrix(world: int, run_cli: RunCli, free_port: int) -> dict[str, dict[str, dict[str, int]]]:
    command = ["torchrun", "--nproc-per-node", str(world), "--master-port", str(free_port), SCRIPT]
    done = run_cli(command, env={"OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict[str, int]]] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    return found
