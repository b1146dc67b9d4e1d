from __future__ import annotations

import pytest
from engine.ranks import Matrix

REFUSALS = ["the loss is nan", "the loss is nan", "the norm of the gradient is nan", "the norm of the gradient is inf"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"),
    [(2, "half_refused"), *(pytest.param(world, "refused", marks=pytest.mark.slow) for world in (1, 2, 4))],
)
def test_a_refused_batch_leaves_no_trace(world: int, cases: str, matrix: Matrix) -> None:
    """NaN and infinity in the pixels, or in one parameter's gradient, of one rank: all ranks refuse it for the same
    reason; weights, moments, average and the count of steps stay bit by bit, and so does all that follows.

    Every ZeRO stage, offloaded too, with and without gradient caching. In fp16 an overflow halves the loss scale and is
    not the guard's; a NaN in the batch leaves the scale as it is.
    """
    found = matrix(world, "guard_matrix", cases)
    stages = 4 if world == 1 else 7
    assert len(found) == (3 * stages if cases == "refused" else stages + (stages + 1) // 2)
    for case, told in found.items():
        if not case.startswith("fp16"):
            assert told.pop("faults") == 2 * REFUSALS, case
            assert told.pop("untouched") == [True, True], case
        assert all(told.values()), f"{case}: {told}"
