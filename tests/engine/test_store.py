from __future__ import annotations

import ast
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from cmpt.engine.manifest import MANIFEST, CheckpointError, entry, verify
from cmpt.engine.store import LATEST, Store


def put(store: Store, *steps: int, hours_old: float = 0.0) -> None:
    """Publish, copy and prune as Checkpoints does it; the folders of the new ones are made older."""
    for step in steps:
        beside = store.beside(step)
        beside.mkdir(parents=True)
        for name in ("part-00000-of-00001.safetensors", "state.json"):
            (beside / name).write_bytes(f"{name} of step {step}".encode() * 9)
        final = store.publish(step, {path.name: entry(path) for path in beside.iterdir()})
        copied = store.copy(final)
        for path in (final, copied):
            if path is not None:
                os.utime(path, times=(time.time() - hours_old * 3600,) * 2)
        store.prune()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [int(name[5:]) for name in names(folder) if name.startswith("step_")]


def damage(checkpoint: Path) -> None:
    with (checkpoint / "state.json").open("r+b") as file:
        file.write(b"!")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "first", keep=2, copies=tmp_path / "second" / "run")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return tmp_path / "second" / "run"


def test_both_folders_hold_whole_checkpoints_and_latest_names_the_newest(store: Store, second: Path) -> None:
    for step in (3, 6, 9):
        put(store, step)
        assert (store.folder / LATEST).read_text() == f"step_{step:08d}\n"
    assert names(store.folder) == [LATEST, "step_00000006", "step_00000009"]
    assert names(second) == ["step_00000006", "step_00000009"]
    for folder in (store.folder, second):
        for step in (6, 9):
            verify(folder / f"step_{step:08d}")


@pytest.mark.parametrize(
    ("keep", "hours", "kept"), [(1, 0, [4]), (3, 0, [2, 3, 4]), (1, 5, [3, 4]), (2, 50, [1, 2, 3, 4])]
)
def test_the_newest_and_the_young_are_kept(keep: int, hours: float, kept: list[int], tmp_path: Path) -> None:
    store = Store(tmp_path / "first", keep, hours, tmp_path / "second")
    for step, hours_old in ((1, 30), (2, 20), (3, 4), (4, 0)):
        put(store, step, hours_old=hours_old)
    store.prune()
    assert steps(tmp_path / "first") == steps(tmp_path / "second") == kept


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    put(Store(tmp_path, keep=0), 1, 2)
    assert steps(tmp_path) == [2]


def test_the_second_folder_is_pruned_for_itself(store: Store, second: Path) -> None:
    put(store, 1, 2)
    shutil.rmtree(store.folder)  # a new first disk
    put(store, 3)
    assert steps(store.folder) == [3] and steps(second) == [2, 3]


def test_a_folder_without_a_manifest_does_not_end_retention(store: Store) -> None:
    put(store, 1, 2)
    (store.final(1) / MANIFEST).unlink()
    put(store, 3)
    assert steps(store.folder) == [2, 3]


@pytest.mark.parametrize("loss", ["unsound", "gone", "all gone"])
def test_a_copy_stands_in_where_the_first_folder_fails(loss: str, store: Store, second: Path) -> None:
    put(store, 1, 2)
    if loss == "unsound":
        damage(store.final(2))
    elif loss == "gone":
        shutil.rmtree(store.final(2))
    else:
        shutil.rmtree(store.folder)
    found, faults = store.newest_sound()
    assert found == second / "step_00000002"
    assert len(faults) == (loss == "unsound") and all("step_00000002" in fault for fault in faults)


def test_the_newest_sound_one_is_found_wherever_it_is(store: Store, second: Path) -> None:
    put(store, 1, 2)
    damage(store.final(2))
    damage(second / "step_00000002")
    damage(store.final(1))
    found, faults = store.newest_sound()
    assert found == second / "step_00000001" and len(faults) == 3
    assert set(store.set_aside()) == {
        store.folder / ".unsound_step_00000001",
        store.folder / ".unsound_step_00000002",
        second / ".unsound_step_00000002",
    }


def test_of_two_alike_the_first_folder_is_used(store: Store) -> None:
    put(store, 1)
    assert store.newest_sound() == (store.final(1), [])


def test_what_is_unsound_is_kept_until_the_next_checkpoint(store: Store, second: Path) -> None:
    put(store, 1, 2)
    damage(store.final(2))
    damage(second / "step_00000002")
    store.newest_sound()
    store.clean()
    assert len(store.set_aside()) == 2
    put(store, 3)
    assert store.set_aside() == [] and steps(store.folder) == steps(second) == [1, 3]


def test_leftovers_of_a_kill_are_removed_and_never_taken_for_checkpoints(store: Store, second: Path) -> None:
    put(store, 1)
    for folder in (store.folder, second):
        for kind in ("writing", "deleting"):
            shutil.copytree(store.final(1), folder / f".{kind}_step_00000007")
    assert store.newest_sound() == (store.final(1), [])
    store.clean()
    assert names(store.folder) == [LATEST, "step_00000001"] and names(second) == ["step_00000001"]


def test_a_copy_that_came_out_wrong_is_an_error_and_leaves_nothing(
    store: Store, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, 1)
    copy = shutil.copy

    def wrong(source: Path, target: Path) -> None:
        copy(source, target)
        if target.name == "state.json":
            damage(target.parent)

    monkeypatch.setattr(shutil, "copy", wrong)
    with pytest.raises(CheckpointError, match="state.json: its SHA-256"):
        put(store, 2)
    assert names(second) == ["step_00000001"]
    verify(store.final(2))


def test_an_unsound_copy_is_replaced_and_a_sound_one_stays(store: Store, second: Path) -> None:
    put(store, 1)
    before = (second / "step_00000001").stat().st_ino
    store.copy(store.final(1))
    assert (second / "step_00000001").stat().st_ino == before
    damage(second / "step_00000001")
    store.copy(store.final(1))
    verify(second / "step_00000001")
    store.clean()
    assert names(second) == ["step_00000001"]


def test_a_copy_holds_what_the_manifest_lists_and_no_more(store: Store, second: Path) -> None:
    put(store, 1)
    (store.final(1) / "notes.pkl").write_bytes(b"not ours")
    shutil.rmtree(second)
    store.copy(store.final(1))
    assert names(second / "step_00000001") == [MANIFEST, "part-00000-of-00001.safetensors", "state.json"]


def test_without_a_second_folder_there_are_no_copies(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    put(store, 1)
    assert store.copy(store.final(1)) is None and names(tmp_path) == [LATEST, "step_00000001"]


@pytest.mark.parametrize("fault", ["missing", "short"])
def test_a_part_that_is_not_there_is_not_published(fault: str, store: Store) -> None:
    beside = store.beside(4)
    beside.mkdir(parents=True)
    part = beside / "part-00001-of-00002.safetensors"
    part.write_bytes(b"of another host")
    files = {part.name: entry(part)}
    if fault == "missing":
        part.unlink()
    else:
        part.write_bytes(b"of anoth")
    with pytest.raises(CheckpointError, match="file system that all hosts share"):
        store.publish(4, files)
    store.abandon(4)
    assert names(store.folder) == []


def test_a_run_that_starts_over_forgets_the_copies_of_the_one_before(store: Store, second: Path) -> None:
    put(store, 1, 2)
    damage(second / "step_00000002")
    store.newest_sound()
    (second / "notes.txt").write_text("not ours")
    shutil.rmtree(store.folder)
    store.forget_copies()
    assert names(second) == ["notes.txt"]
    assert store.newest_sound() == (None, [])


def test_nothing_in_cmpt_unpickles_a_file() -> None:
    """torch.load with weights_only=True, in the import of foreign weights, is the one reader of a pickle."""
    calls = []
    for path in sorted((REPOSITORY / "cmpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "cPickle", "dill", "joblib", "shelve"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
                if call in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
                    pytest.fail(f"{path}: {call}")
                if call == "torch.load":
                    calls.append(str(path.relative_to(REPOSITORY)))
                    assert given.get("weights_only") == "True", path
                if call in ("np.load", "numpy.load"):
                    assert given.get("allow_pickle", "False") == "False", path
    assert calls == ["cmpt/models/pretrained.py"]
