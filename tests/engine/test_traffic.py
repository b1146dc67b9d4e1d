from __future__ import annotations

import pytest
from engine.ranks import Matrix

from cmpt.engine.traffic import expected_bytes

CASES = 4 * 2 * 2 + 2 * 2 + 2


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"), [(2, "half"), *(pytest.param(world, "all", marks=pytest.mark.slow) for world in (2, 4))]
)
def test_counted_bytes_are_those_that_torch_sees_and_those_of_the_arithmetic(
    world: int, cases: str, matrix: Matrix
) -> None:
    """Every ZeRO stage, with and without gradient caching, both losses; and holes."""
    found = matrix(world, "traffic_matrix", cases)
    assert len(found) == (CASES if cases == "all" else 10)
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
def test_one_process_alone_sends_nothing(matrix: Matrix) -> None:
    found = matrix(1, "traffic_matrix", "all")
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
