from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.small import BATCH, IMAGE_SIZE, MODEL, rows_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cmpt.dist import process_group
from cmpt.engine import checkpoint, sharded
from cmpt.engine.build import Trained, build
from cmpt.engine.checkpoint import Checkpoints, Report, TrainState
from cmpt.engine.manifest import MANIFEST, STATE, CheckpointError, entry, listed_files, verify, write_manifest
from cmpt.engine.parts import Parts
from cmpt.engine.step import find_gradient, take_step
from cmpt.engine.store import Store
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

PART = "part-00000-of-00001.safetensors"
KINDS = ["param", "exp_avg", "exp_avg_sq", "ema"]


def new(seed: int, stage: int = 0, width: int = 36, ema_decay: float | None = 0.5) -> Trained:
    if not torch.distributed.is_initialized():
        process_group.start()
    model = replace(MODEL, vision=replace(MODEL.vision, width=width))
    settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage, deepspeed={"zero_optimization": {}})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return build(CLIP(model, IMAGE_SIZE, seed), settings, Optimizer(ema_decay=ema_decay), 1, device)


def step(trained: Trained, number: int = 0) -> float:
    device = trained.engine.device
    patches, text, _ = rows_of(list(range(BATCH)), [], number)
    there = {"patches_TP": patches.patches_TP.to(device), "position_T": patches.position_T.to(device)}
    result = find_gradient(trained, replace(patches, **there), text.to(device), None, Loss())
    take_step(trained, result, 1e-3, 1.0)
    return result.loss


def bits(trained: Trained) -> dict[str, torch.Tensor]:
    kept = sharded.kept_tensors(trained.engine, trained.average)
    return {
        f"{kind}/{piece.name}": piece.of(flats).clone().cpu()
        for kind, flats in kept.items()
        for piece in sharded.pieces(trained.engine)
    }


def state_of(number: int) -> TrainState:
    return TrainState(
        number, {"slots": [[number, 0]]}, {"threshold": float(number)}, {"broken_image": 3}, {}, 5, 32, "x"
    )


def saved(folder: Path, trained: Trained, *steps: int) -> Checkpoints:
    """One after the other, each complete."""
    checkpoints = Checkpoints(Store(folder, keep=9))
    for number in steps:
        checkpoints.save(trained, state_of(number))
        checkpoints.finish()
    return checkpoints


@pytest.fixture(scope="module")
def trained() -> Trained:
    built = new(seed=1)
    for number in range(2):
        step(built, number)
    return built


@pytest.fixture(scope="module")
def pristine(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 3 and 6, for tests to copy."""
    folder = tmp_path_factory.mktemp("pristine")
    saved(folder, trained, 3)
    step(trained, 2)
    saved(folder, trained, 6)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "checkpoints")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_saved_comes_back_bit_by_bit(stage: int, tmp_path: Path) -> None:
    # Not at stage 3, where DeepSpeed changes torch for the whole process; elastic_matrix.py does that.
    ours = new(seed=1, stage=stage)
    for number in range(2):
        step(ours, number)
    ours.loss_scale.value = 4096.0
    saved(tmp_path, ours, 7)
    before = bits(ours)
    ours.loss_scale.value = 1.0
    onward = [step(ours, number) for number in range(2, 4)]
    theirs = new(seed=2, stage=stage)
    checkpoints = Checkpoints(Store(tmp_path, keep=1))
    assert checkpoints.load_newest(theirs) == state_of(7)
    after = bits(theirs)
    assert {name.partition("/")[0] for name in before} == set(KINDS) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert theirs.loss_scale.value == 4096.0
    theirs.loss_scale.value = 1.0
    assert [step(theirs, number) for number in range(2, 4)] == onward


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    write, go = checkpoint.write_part, threading.Event()
    monkeypatch.setattr(checkpoint, "write_part", lambda *arguments: go.wait(60) and write(*arguments))
    return go


def test_a_checkpoint_is_what_it_was_when_save_returned(trained: Trained, tmp_path: Path, go: threading.Event) -> None:
    """Training goes on while it is written, and the buffers are used again for the next one."""
    checkpoints = Checkpoints(Store(tmp_path, keep=9))
    expected = []
    for number in (1, 2):
        go.clear()
        expected.append(bits(trained))
        checkpoints.save(trained, state_of(number))
        step(trained)
        go.set()
        checkpoints.finish()
    for number, before in zip((1, 2), expected, strict=True):
        parts = Parts(tmp_path / f"step_{number:08d}")
        for kind in KINDS:
            assert all(torch.equal(before[f"{kind}/{n}"], t.flatten()) for n, t in parts.full(kind).items())


def test_a_slow_disk_leaves_checkpoints_out_but_holds_nobody_up_and_the_last_one_waits(
    trained: Trained, tmp_path: Path, go: threading.Event
) -> None:
    checkpoints = Checkpoints(Store(tmp_path, keep=9))
    for number in range(1, 6):  # nothing of step 1 is written while these steps are made
        step(trained, number)
        checkpoints.settle(*checkpoints.progress())
        checkpoints.save(trained, state_of(number))
    assert list(tmp_path.glob("step_*")) == []
    reports = checkpoints.taken_reports()
    assert [(report.step, report.path) for report in reports] == [(number, None) for number in range(2, 6)]
    assert reports[0].fault == ("no checkpoint of step 2: that of step 1 is still being written; the disk is too slow")
    threading.Timer(0.2, go.set).start()
    checkpoints.save(trained, state_of(6), last=True)
    checkpoints.finish()
    assert [(report.step, report.fault) for report in checkpoints.taken_reports()] == [(1, None), (6, None)]
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00000001", "step_00000006"]


def test_a_report_says_what_a_checkpoint_cost(trained: Trained, tmp_path: Path) -> None:
    (report,) = saved(tmp_path, trained, 4).taken_reports()
    size = sum(path.stat().st_size for path in (tmp_path / "step_00000004").iterdir() if path.name != MANIFEST)
    assert report == Report(4, tmp_path / "step_00000004", None, size, report.write_s, report.stall_s)
    assert 0 < report.stall_s < report.write_s


def test_what_a_resume_relies_on_is_on_the_disk_before_the_checkpoint_is_seen(trained: Trained, tmp_path: Path) -> None:
    seen: list[list[Path]] = []
    checkpoints = Checkpoints(Store(tmp_path, keep=9), lambda: seen.append(list(tmp_path.glob("step_*"))))
    checkpoints.save(trained, state_of(1))
    checkpoints.finish()
    assert seen == [[]]

    def full() -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    checkpoints.before_publishing = full
    checkpoints.save(trained, state_of(2))
    with pytest.raises(CheckpointError, match="step 2 could not be written: .*No space left on device"):
        checkpoints.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_a_write_that_fails_is_reported_and_the_next_one_is_well(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise SafetensorError("No space left on device")

    checkpoints = saved(tmp_path, trained, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_part", full)
        checkpoints.save(trained, state_of(2))
        with pytest.raises(CheckpointError, match="step 2 could not be written: rank 0: No space left on device"):
            checkpoints.finish()
    checkpoints.save(trained, state_of(3))
    checkpoints.finish()
    reports = checkpoints.taken_reports()
    assert [(report.step, report.path is None) for report in reports] == [(1, False), (2, True), (3, False)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]


def test_a_copy_that_fails_is_reported_and_the_checkpoint_stays(trained: Trained, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.write_text("a file where the folder should be")
    checkpoints = Checkpoints(Store(tmp_path / "first", keep=1, copies=second))
    for number in (1, 2):
        checkpoints.save(trained, state_of(number))
        checkpoints.finish()
        written, *faults = checkpoints.taken_reports()
        assert written.path is not None and written.fault is None
        assert faults and all(fault.path is None and str(second) in str(fault.fault) for fault in faults)
    assert [path.name for path in (tmp_path / "first").glob("step_*")] == ["step_00000002"]


def test_a_rewind_waits_for_the_checkpoint_that_is_being_written(trained: Trained, tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(tmp_path, keep=9))
    assert checkpoints.rewind(trained) is None
    before = bits(trained)
    checkpoints.save(trained, state_of(4))
    step(trained)
    assert checkpoints.rewind(trained) == state_of(4)
    after = bits(trained)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_checkpoint_is_none(trained: Trained, tmp_path: Path) -> None:
    assert Checkpoints(Store(tmp_path, keep=3)).load_newest(trained) is None


def test_an_average_begins_with_the_weights_where_none_was_kept(tmp_path: Path) -> None:
    ours = new(seed=1, ema_decay=None)
    step(ours)
    saved(tmp_path, ours, 1)
    theirs = new(seed=2)
    assert Checkpoints(Store(tmp_path, keep=1)).load_newest(theirs) is not None
    found = bits(theirs)
    assert all(torch.equal(found[name], found[f"ema/{name[6:]}"]) for name in found if name.startswith("param/"))


def test_each_of_a_hundred_flipped_bits_is_found(folder: Path) -> None:
    """In a random byte of a random file; then in every bit of the manifest."""
    checkpoint_folder, chance = folder / "step_00000006", random.Random(0)
    files = sorted(checkpoint_folder.iterdir())
    assert [path.name for path in files] == [MANIFEST, PART, STATE]
    for number in range(100):
        path = files[number % 3]
        content = path.read_bytes()
        place, bit = chance.randrange(len(content)), chance.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=path.name):
            verify(checkpoint_folder)
        path.write_bytes(content)
    manifest = checkpoint_folder / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(CheckpointError):
                listed_files(checkpoint_folder)
    manifest.write_bytes(content)
    verify(checkpoint_folder)


@pytest.mark.parametrize("name", [PART, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete", "of another", "a folder"])
def test_a_damaged_checkpoint_is_passed_over_and_said(name: str, damage: str, trained: Trained, folder: Path) -> None:
    victim, other = folder / "step_00000006" / name, folder / "step_00000003" / name
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "extend":
        victim.write_bytes(content + b" ")
    elif damage == "of another":
        assert other.read_bytes() != content
        shutil.copy(other, victim)
    else:
        victim.unlink()
        if damage == "a folder":
            victim.mkdir()
    checkpoints = Checkpoints(Store(folder, keep=9))
    assert checkpoints.load_newest(trained) == state_of(3)
    assert len(checkpoints.faults) == 1 and "step_00000006" in checkpoints.faults[0]


def test_two_files_that_changed_places_are_found(folder: Path) -> None:
    part, state = folder / "step_00000006" / PART, folder / "step_00000006" / STATE
    contents = part.read_bytes(), state.read_bytes()
    part.write_bytes(contents[1])
    state.write_bytes(contents[0])
    with pytest.raises(CheckpointError, match=PART):
        verify(folder / "step_00000006")


def test_files_that_the_manifest_does_not_list_are_not_opened(trained: Trained, folder: Path) -> None:
    newest = folder / "step_00000006"
    ones = {key: torch.ones_like(piece) for key, piece in load_file(newest / PART).items()}
    starts = json.dumps({key.partition("/")[2]: 0 for key in ones})
    save_file(ones, newest / "part-00001-of-00001.safetensors", {"starts": starts})
    (newest / "part-00001-of-00002.safetensors").write_bytes(b"not even a safetensors file")
    (newest / "model.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    opened: set[str] = set()
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:  # cannot be taken out again
        if watching and event == "open":
            opened.add(Path(str(arguments[0])).name)

    sys.addaudithook(watch)
    theirs = new(seed=2)
    assert Checkpoints(Store(folder, keep=9)).load_newest(theirs) == state_of(6)
    watching = False
    assert {MANIFEST, STATE, PART} <= opened
    assert not {"part-00001-of-00001.safetensors", "part-00001-of-00002.safetensors", "model.pkl"} & opened
    parts = Parts(newest)
    found = bits(theirs)
    assert all(torch.equal(found[f"param/{name}"].view(t.shape), t) for name, t in parts.full("param").items())
    assert not all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in found.values())


@pytest.mark.parametrize("kind", ["a part", "a tensor", "no safetensors file"])
def test_a_sound_manifest_of_too_little_is_an_error(kind: str, trained: Trained, folder: Path) -> None:
    """Written by hand, hashes and all: nothing is left at its initial value in silence."""
    newest = folder / "step_00000006"
    if kind == "a tensor":
        tensors = load_file(newest / PART)
        starts = json.dumps({key.partition("/")[2]: 0 for key in tensors})
        del tensors["exp_avg/visual.proj.weight" if "exp_avg/visual.proj.weight" in tensors else min(tensors)]
        save_file(tensors, newest / PART, {"starts": starts})
    elif kind == "no safetensors file":
        (newest / PART).write_bytes(b"something else")
    listed = [STATE] if kind == "a part" else [STATE, PART]
    write_manifest(newest, 6, {name: entry(newest / name) for name in listed})
    verify(newest)
    with pytest.raises(
        CheckpointError, match="cannot be read" if kind == "no safetensors file" else "of [0-9]+ elements"
    ):
        checkpoint.load(newest, trained)


def test_without_any_sound_checkpoint_it_refuses_to_start_over(trained: Trained, folder: Path) -> None:
    for number in (3, 6):
        (folder / f"step_{number:08d}" / STATE).unlink()
    for _ in range(2):  # the second time as well
        with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
            Checkpoints(Store(folder, keep=9)).load_newest(trained)


def test_a_checkpoint_of_another_version_is_named_so(folder: Path) -> None:
    manifest = folder / "step_00000006" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(CheckpointError, match=r"another version of cmpt \(format 1, expected 2\)"):
        verify(manifest.parent)


def test_what_was_being_written_is_not_taken_for_a_checkpoint(trained: Trained, folder: Path) -> None:
    (folder / "step_00000006").rename(folder / ".writing_step_00000006")
    assert Checkpoints(Store(folder, keep=9)).load_newest(trained) == state_of(3)
    assert not (folder / ".writing_step_00000006").exists()


def test_a_run_falls_back_to_the_copy_in_the_second_folder(trained: Trained, tmp_path: Path) -> None:
    store = Store(tmp_path / "first", keep=1, copies=tmp_path / "second")
    checkpoints = Checkpoints(store)
    checkpoints.save(trained, state_of(8))
    checkpoints.finish()
    before = bits(trained)
    (tmp_path / "first" / "step_00000008" / PART).unlink()
    theirs, again = new(seed=2), Checkpoints(store)
    assert again.load_newest(theirs) == state_of(8)
    after = bits(theirs)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(again.faults) == 1 and str(tmp_path / "first") in again.faults[0]


def test_a_checkpoint_of_another_model_names_the_tensors(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensors do not fit the model: .*\(40,.*\(36,"):
        Checkpoints(Store(folder, keep=3)).load_newest(new(seed=1, width=40))
