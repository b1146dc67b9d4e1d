"""The tool that makes evaluation sets of the clip art: what it makes is read back by the suite that names it."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import prepare_eval_sets
from clipart_questions import Picture, is_false, make_questions
from cmpt.data.eval_sets import LabelledSet, open_captioned, open_choices, open_labelled
from cmpt.recipe.paths import PACKAGE
from cmpt.recipe.suite import Task, load_suite

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "eval_sets"
    assert prepare_eval_sets.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.name: task for task in load_suite(REPOSITORY / "recipes/eval/clipart.yaml").tasks}


@pytest.fixture(scope="module")
def heldout() -> dict[bytes, dict]:
    """JPEG -> its JSON, read without any of the tool's or cmpt's readers."""
    with tarfile.open(PACKAGE / "data/clipart/heldout-0000.tar") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return {data: json.loads(members[name[:-3] + "json"]) for name, data in members.items() if name.endswith(".jpg")}


def stored(dataset: object) -> Iterator[bytes]:
    """The bytes of each image."""
    store = dataset.images._store  # type: ignore[attr-defined]
    return (store.read(index) for index in range(len(store)))


def test_both_classification_sets_hold_every_heldout_picture_with_its_category(made, tasks, heldout) -> None:
    for name in ("clipart", "clipart_folders"):
        dataset: LabelledSet = open_labelled(tasks[name], tasks[name].folder(made))
        found = {data: dataset.classnames[label] for data, label in zip(stored(dataset), dataset.label_N, strict=True)}
        assert found == {data: fields["category"] for data, fields in heldout.items()}
        assert len(dataset.images) == 500 and len(dataset.templates) == 3


def test_the_probe_s_train_split_has_the_same_classes_and_none_of_the_test_pictures(made, tasks, heldout) -> None:
    task = tasks["clipart_probe"]
    train, test = (open_labelled(task, task.folder(made), split) for split in (task.train_split, task.split))
    assert train.classnames == test.classnames and set(train.label_N) == set(range(38))
    assert not set(stored(train)) & heldout.keys()


def test_the_captions_are_each_picture_s_own_and_answer_to_one_picture_only(made, tasks, heldout) -> None:
    task = tasks["clipart_captions"]
    dataset = open_captioned(task, task.folder(made))
    for data, captions in zip(stored(dataset), dataset.captions, strict=True):
        assert captions[0] == heldout[data]["captions"][0] and set(captions) <= set(heldout[data]["captions"])
    counts = Counter(caption.casefold() for captions in dataset.captions for caption in captions)
    assert max(counts.values()) == 1 and max(map(len, dataset.captions)) > 2 and len(dataset.captions) == 500


def test_no_negative_caption_says_what_a_caption_of_the_picture_says(made, tasks, heldout) -> None:
    """In words: it has one that none of them has; where two colours changed places, it is in none of them."""
    task = tasks["clipart_composition"]
    dataset = open_choices(task, task.folder(made))
    assert {category: count >= 50 for category, count in Counter(dataset.category_N).items()} == {
        name: True for name in ("replace_att", "replace_obj", "swap_att", "swap_obj")
    }
    images = list(stored(dataset))
    exchanged = 0
    for place, caption, negative in zip(dataset.image_N, dataset.caption_N, dataset.negative_N, strict=True):
        own = heldout[images[place]]["captions"]
        assert caption == own[0] and not any(negative.casefold() in text.casefold() for text in own)
        new = set(re.findall(r"\w+", negative.casefold())) - set(re.findall(r"\w+", " ".join(own).casefold()))
        exchanged += not new
        assert new or sorted(re.findall(r"\w+", negative.casefold())) == sorted(re.findall(r"\w+", caption.casefold()))
    assert exchanged == 3


def picture(key: str, *captions: str) -> Picture:
    return Picture(key, b"", list(captions), "things")


@pytest.mark.parametrize(
    ("caption", "other", "expected"),
    [
        ("Outline of a kangaroo", "Ant", None),  # "a ant"
        ("Outline of a kangaroo", "Running fox", "Outline of a fox"),
        ("Sword", "Grey stapler", "Stapler"),
        ("Add icon, flat style", "Add folder icon, lemon style", None),  # a folder that is added is an addition
        ("Add icon, flat style", "Zip icon, lemon style", "Zip icon, flat style"),
        ("Flag of Oman", "Flag of Fiji", "Flag of Fiji"),
    ],
)
def test_an_object_is_replaced_where_that_makes_a_false_caption(caption: str, other: str, expected: str | None) -> None:
    questions = make_questions([picture("1", caption), picture("2", other)])["replace_obj"]
    assert [negative for asked, negative in questions if asked.key == "1"] == ([expected] if expected else [])


def test_a_word_of_another_caption_of_the_picture_does_not_make_a_negative() -> None:
    assert not is_false("A fox", picture("1", "An animal", "a red fox")) and is_false("A cow", picture("1", "A fox"))
    pictures = [picture("1", "Sword", "sword, handbag"), picture("2", "Handbag")]
    assert [asked.key for asked, _ in make_questions(pictures)["replace_obj"]] == ["2"]


def test_attributes_change_places_between_two_pictures() -> None:
    pictures = [picture("1", "White balloon"), picture("2", "Two red dice"), picture("3", "Black and white bird")]
    negatives = {asked.key: negative for asked, negative in make_questions(pictures)["swap_att"]}
    assert negatives == {"1": "Red balloon", "2": "Two white dice"}


def test_a_colour_is_not_replaced_by_one_that_it_may_be_taken_for() -> None:
    pictures = [picture("1", "Blue pane"), picture("2", "Purple arrow"), picture("3", "Green folder")]
    questions = make_questions(pictures)["replace_att"]
    assert {asked.key: negative for asked, negative in questions if asked.key != "3"} == {
        "1": "Green pane",
        "2": "Green arrow",
    }


def test_the_same_bytes_on_every_run_and_a_second_run_changes_nothing(made, tmp_path, capsys) -> None:
    assert prepare_eval_sets.main(["--out", str(tmp_path / "again")]) == 0
    files, again = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (made, tmp_path / "again")
    )
    assert files == again
    assert all((made / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    before = {name: (made / name).stat().st_mtime_ns for name in files}
    capsys.readouterr()
    assert prepare_eval_sets.main(["--out", str(made)]) == 0
    assert {name: (made / name).stat().st_mtime_ns for name in files} == before
    assert capsys.readouterr().out.count("(was there)") == 4


def test_other_things_are_not_overwritten(made, tmp_path, capsys) -> None:
    (tmp_path / "wds_clipart").mkdir()
    (tmp_path / "wds_clipart/classnames.txt").write_text("mine\n")
    assert prepare_eval_sets.main(["--out", str(tmp_path)]) == 1
    assert "wds_clipart: holds something else" in capsys.readouterr().err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "wds_clipart",
        "wds_clipart/classnames.txt",
    ]
    assert (tmp_path / "wds_clipart/classnames.txt").read_text() == "mine\n"
    (tmp_path / "file").write_text("")
    assert prepare_eval_sets.main(["--out", str(tmp_path / "file")]) == 1
