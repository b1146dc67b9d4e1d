from __future__ import annotations

import json

import pytest
from engine.ranks import Matrix


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fifty_steps_of_the_quickstart_agree_at_every_world_size_and_stage(matrix: Matrix) -> None:
    """Invariant 2: with and without gradient caching, both losses, against one process at stage 0; fp32."""
    found = {world: matrix(world, "curve_matrix", timeout=3600) for world in (1, 2, 4)}
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
