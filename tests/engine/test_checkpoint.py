from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cmpt.dist import process_group
from cmpt.engine import sharded
from cmpt.engine.build import DeepSpeedEngine, build_engine
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.manifest import MANIFEST, CheckpointError, verify
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Model, Optimizer, Text, Vision

MODEL = Model(
    patch_size=8,
    embed_dim=16,
    vision=Vision(width=16, layers=1, heads=2),
    text=Text(width=16, layers=1, heads=2),
    context_length=8,
    vocab_size=20,
)


def new_engine(seed: int, width: int = 16) -> DeepSpeedEngine:
    model = Model(**{**vars(MODEL), "vision": Vision(width=width, layers=1, heads=2)})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return build_engine(CLIP(model, 16, seed), Engine(batch_size=4, precision="fp32"), Optimizer(), 1, device)


@pytest.fixture(scope="module")
def engine() -> DeepSpeedEngine:
    if not torch.distributed.is_initialized():
        process_group.start()
    return new_engine(seed=1)


def saved(folder: Path, engine: DeepSpeedEngine, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(engine, TrainState(step=step, loader={"step": step}, skipped={"broken_image": step}, seed=5))
    return checkpoints


def test_what_is_saved_comes_back(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, engine, 7)
    other = new_engine(seed=2)
    state = checkpoints.load_newest(other)
    assert state == TrainState(step=7, loader={"step": 7}, skipped={"broken_image": 7}, seed=5)
    ours, theirs = dict(sharded.full_state(engine)), dict(sharded.full_state(other))
    assert all(torch.equal(ours[name]["param"], theirs[name]["param"]) for name in ours)


def test_no_checkpoint_is_none(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 3).load_newest(engine) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    name: str, damage: str, engine: DeepSpeedEngine, tmp_path: Path
) -> None:
    checkpoints = saved(tmp_path, engine, 3, 6)
    victim = tmp_path / "step_00000006" / name
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    try:
        verify(victim.parent)
    except CheckpointError:
        pass
    else:  # a flipped bit in white space or in a digit of the manifest's own "step" harms nothing that is read
        assert name == MANIFEST and damage == "flip"
        return
    state = checkpoints.load_newest(new_engine(seed=3))
    assert state is not None and state.step == 3
    assert len(checkpoints.faults) == 1 and "step_00000006" in checkpoints.faults[0]


def test_without_any_sound_checkpoint_it_refuses_to_start_over(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, engine, 3)
    (tmp_path / "step_00000003" / "state.json").unlink()
    for _ in range(2):  # the second time as well
        with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
            checkpoints.load_newest(engine)


def test_a_write_that_was_cut_off_is_not_taken_for_a_checkpoint(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, engine, 3)
    beside = tmp_path / ".writing_step_00000006"
    beside.mkdir()
    (beside / "model.safetensors").write_bytes(b"half")
    state = checkpoints.load_newest(new_engine(seed=3))
    assert state is not None and state.step == 3
    saved(tmp_path, engine, 9)
    assert not beside.exists()


def test_only_the_newest_are_kept(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_an_unsound_one_takes_nobodys_place(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    """Found unsound at 9, gone on from 3, stopped at 6: what is kept is 6."""
    checkpoints = saved(tmp_path, engine, 3, 9)
    (tmp_path / "step_00000009" / "model.safetensors").unlink()
    checkpoints.load_newest(new_engine(seed=3))
    saved(tmp_path, engine, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000006"]


def test_a_write_that_fails_is_a_checkpoint_error(
    engine: DeepSpeedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("cmpt.engine.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="step_00000003 could not be written: No space left on device"):
        saved(tmp_path, engine, 3)


def test_a_checkpoint_of_another_model_names_the_tensors(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 1)
    with pytest.raises(CheckpointError, match=r"tensors do not fit the model: .*\(16,\)"):
        Checkpoints(tmp_path, 3).load_newest(new_engine(seed=1, width=32))


def test_the_manifest_lists_every_file(engine: DeepSpeedEngine, tmp_path: Path) -> None:
    saved(tmp_path, engine, 1)
    folder = tmp_path / "step_00000001"
    listed = set(json.loads((folder / MANIFEST).read_text())["files"])
    assert listed == {path.name for path in folder.iterdir()} - {MANIFEST}
