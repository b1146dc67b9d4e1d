"""A suite's sets are opened together: what is wrong with one is told with its task, on every rank alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.making import jpeg
from data.making_eval_sets import label_samples, write_choices, write_image_folder, write_labelled, write_split

from cmpt.data.validate import DataError
from cmpt.evals import tasks
from cmpt.evals.tasks import open_tasks
from cmpt.recipe.suite import Suite, Task

FIRST, SECOND = Task("first", "zero_shot", "labels", "webdataset"), Task("second", "zero_shot", "more", "webdataset")
PROBE = Task("probe", "linear_probe", "labels", "webdataset")


def test_two_splits_of_class_folders_are_of_the_same_classes(tmp_path: Path) -> None:
    """Three names for three folders each, but the third is another class."""
    folder = write_image_folder(tmp_path / "set", ["a", "b", "c"], 2)
    for name in ("a", "b", "d"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0.jpg").write_bytes(jpeg(1))
    (folder / "classnames.txt").write_text("one\ntwo\nthree\n")
    task = Task("probe", "linear_probe", "set", "image_folder")
    with pytest.raises(DataError, match="task probe: .*set: the classes of train are not those of test"):
        open_tasks(Suite([task]), tmp_path)


def test_a_probe_needs_two_classes(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "labels", label_samples(3))
    write_split(folder / "train", [{"jpg": jpeg(n), "cls": 1} for n in range(3)])
    with pytest.raises(DataError, match="task probe: .*labels/train: a probe needs two classes"):
        open_tasks(Suite([PROBE]), tmp_path)


def test_a_metric_of_composition_is_a_category_or_the_mean(tmp_path: Path) -> None:
    write_choices(tmp_path / "set", {"swap_obj": [("a.jpg", "one", "two")]})
    task = Task("words", "composition", "set", "sugarcrepe", metric="swap_ob")
    with pytest.raises(DataError, match="metric swap_ob: expected one of accuracy, swap_obj; did you mean swap_obj"):
        open_tasks(Suite([task]), tmp_path)


def test_what_is_absent_is_left_out_unless_it_is_asked_for_or_all_there_is(tmp_path: Path) -> None:
    write_labelled(tmp_path / "labels", label_samples(3))
    opened, absent = open_tasks(Suite([FIRST, SECOND, PROBE]), tmp_path)
    assert [one.task.name for one in opened] == ["first"]
    assert list(absent) == ["second", "probe"] and "no split 'train'" in absent["probe"]
    assert not open_tasks(Suite([FIRST, SECOND]), tmp_path, ["first"])[1]
    for suite, chosen, said in (
        ([FIRST, SECOND], ["second"], "task second: .*more: there is no such folder"),
        ([SECOND], [], "none of the suite's sets is there: .*more: there is no such folder"),
        ([FIRST], ["frist"], "no task frist: expected one of first; did you mean first"),
    ):
        with pytest.raises(DataError, match=said):
            open_tasks(Suite(suite), tmp_path, chosen)
    with pytest.raises(DataError, match="gone: the folder of the evaluation sets is missing"):
        open_tasks(Suite([FIRST]), tmp_path / "gone")


def test_hosts_that_see_other_sets_are_told_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("labels", "more"):
        write_labelled(tmp_path / name, label_samples(3))
    suite = Suite([FIRST, SECOND])
    monkeypatch.setattr(tasks, "gather_objects", lambda own: [own, ("there", ["first"], None)])
    with pytest.raises(DataError, match="set of task second is there on host .*, but not on there"):
        open_tasks(suite, tmp_path)
    monkeypatch.setattr(tasks, "gather_objects", lambda own: [own, ("there", own[1], "a fault there")])
    with pytest.raises(DataError, match="a fault there"):
        open_tasks(suite, tmp_path)
