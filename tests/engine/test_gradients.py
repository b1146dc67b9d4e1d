from __future__ import annotations

import pytest
from engine.ranks import Matrix


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"), [(2, "third"), *(pytest.param(world, "all", marks=pytest.mark.slow) for world in (1, 2, 4))]
)
def test_the_gradient_before_the_optimizer_is_that_of_the_global_loss(world: int, cases: str, matrix: Matrix) -> None:
    """Every ZeRO stage, offloaded too; with and without gradient caching and holes; both losses (fp32)."""
    found = matrix(world, "gradient_matrix", cases)
    assert len(found) == 2 * 2 * 7 * (3 if cases == "all" else 1)
    wrong = {case: apart for case, apart in found.items() if max(apart.values()) > 1e-5}
    assert not wrong
