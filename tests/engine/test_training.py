from __future__ import annotations

from pathlib import Path

import pytest
from engine.ranks import Matrix


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "cases"), [(2, "half"), *(pytest.param(world, "all", marks=pytest.mark.slow) for world in (1, 2, 4))]
)
def test_deepspeed_trains_as_plain_torch_does_on_the_whole_batch(
    world: int, cases: str, matrix: Matrix, tmp_path: Path
) -> None:
    """Loss, gradient norms by tower and, after four AdamW steps with a change of stage in between, every parameter.

    Without and with clipping, layer-wise decay and an average of the weights; in bf16 and fp16 the losses only.
    """
    found = matrix(world, "training_matrix", str(tmp_path), cases)
    assert len(found) == (7 + 2) * (2 if cases == "all" else 1)
    for case, apart in found.items():
        if case.endswith("16"):
            assert apart["loss"] < (0.1 if case.endswith("bf16") else 1e-2), case
            continue
        assert apart["loss"] < 1e-5 and apart["norm"] < 1e-4, case
        # Relative to how far the parameter has moved. Adam divides by the gradient's size: where that is near 0,
        # rounding decides the direction of the first steps; with all gradients clipped to the same size it hardly does.
        assert max(apart["param"], apart.get("ema", 0.0)) < (1e-3 if case.startswith("everything") else 2e-2), case
