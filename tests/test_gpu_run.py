"""The training program on a GPU, with NCCL, against the same run on the CPU of that machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunCli
from test_train import TRAIN, overrides, rows


@pytest.mark.gpu
@pytest.mark.multiprocess
def test_a_gpu_trains_as_a_cpu_does_at_every_stage(tmp_path: Path, run_cli: RunCli) -> None:
    """Digests equal, losses to 1e-3 in fp32 (the products are summed in another order)."""
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = run_cli([*TRAIN, *overrides(tmp_path, "cpu")], env=on_cpu)
    assert done.returncode == 0, done.stderr
    expected = [(row["batch_digest"], pytest.approx(row["loss"], rel=1e-3)) for row in rows(tmp_path / "cpu")]
    for stage in range(4):
        name = f"stage_{stage}"
        keeps_its_stage = "engine.deepspeed={zero_optimization: {}}"
        done = run_cli([*TRAIN, *overrides(tmp_path, name, f"engine.zero_stage={stage}", keeps_its_stage)])
        assert done.returncode == 0, done.stderr
        assert [(row["batch_digest"], row["loss"]) for row in rows(tmp_path / name)] == expected, name
