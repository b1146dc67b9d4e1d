"""Evaluation sets in the formats in which others publish them: read whole, shared out, and what is wrong is told."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from data.making import jpeg, picture, undecodable_jpeg, write_tar
from data.making_eval_sets import (
    CLASSES,
    TEMPLATES,
    label_samples,
    write_captioned,
    write_choices,
    write_image_folder,
    write_labelled,
    write_split,
)

from cmpt.data.eval_files import TarImages
from cmpt.data.eval_sets import EvalSetMissingError, LabelledSet, open_captioned, open_choices, open_labelled
from cmpt.data.validate import DataError
from cmpt.recipe.suite import Task

ZERO_SHOT = Task("x", "zero_shot", "x", "webdataset")
PROBE = Task("x", "linear_probe", "x", "webdataset")
FOLDERS = Task("x", "zero_shot", "x", "image_folder")
RETRIEVAL = Task("x", "retrieval", "x", "webdataset")
COMPOSITION = Task("x", "composition", "x", "sugarcrepe")
SIZE = 16
QUESTIONS = {
    "swap_att": [("a.jpg", "a red cat on a blue bed", "a blue cat on a red bed"), ("bb.jpg", "one", "two")],
    "replace_obj": [("a.jpg", "a cat", "a dog")],
}


def labels_of(dataset: LabelledSet) -> list[str]:
    return [dataset.classnames[label] for label in dataset.label_N]


def test_a_webdataset_folder_of_labels_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    """Eleven shards: 10.tar comes after 9.tar."""
    samples = label_samples(32)
    dataset = open_labelled(ZERO_SHOT, write_labelled(tmp_path / "set", samples, per_shard=3))
    assert dataset.classnames == CLASSES and dataset.templates == TEMPLATES
    assert dataset.label_N == [sample["cls"] for sample in samples]
    assert [dataset.images.name(n) for n in (0, 2, 3, 31)] == [
        "test/0.tar/s0000000.jpg",
        "test/0.tar/s0000002.jpg",
        "test/1.tar/s0000003.jpg",
        "test/10.tar/s0000031.jpg",
    ]
    (batch,) = dataset.images.batches(0, 1, 32, 24)
    for n in range(32):  # 24 x 32 pixels: the view is the middle, not resized
        expected = np.asarray(PIL.Image.open(io.BytesIO(samples[n]["jpg"])))[:, 4:28].transpose(2, 0, 1)
        np.testing.assert_array_equal(batch.images_BCHW[n].numpy(), expected)


@pytest.mark.parametrize(("extension", "image_format"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_other_image_formats_are_read(tmp_path: Path, extension: str, image_format: str) -> None:
    stored = io.BytesIO()
    options = {"lossless": True} if image_format == "WEBP" else {}
    PIL.Image.fromarray(picture(3)).save(stored, format=image_format, **options)
    folder = write_labelled(tmp_path / "set", [{extension: stored.getvalue(), "cls": 2}])
    dataset = open_labelled(ZERO_SHOT, folder)
    assert dataset.images.name(0) == f"test/0.tar/s0000000.{extension}"
    (batch,) = dataset.images.batches(0, 1, 4, 24)
    error = np.abs(batch.images_BCHW[0].numpy().astype(int) - picture(3)[:, 4:28].transpose(2, 0, 1))
    assert error.max() <= (0 if image_format != "JPEG" else 40) and error.mean() < 3


def test_another_split_is_read_for_a_probe_and_needs_no_templates(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", label_samples(5))
    write_split(folder / "train", label_samples(9, first=100))
    (folder / "zeroshot_classification_templates.txt").unlink()
    train = open_labelled(PROBE, folder, PROBE.train_split)
    assert len(train.images) == len(train.label_N) == 9 and train.images.name(0).startswith("train/0.tar/")
    assert len(open_labelled(PROBE, folder).images) == 5 and train.templates == []
    with pytest.raises(DataError, match="zeroshot_classification_templates.txt: is missing"):
        open_labelled(ZERO_SHOT, folder)


def test_a_webdataset_folder_of_captions_is_read(tmp_path: Path) -> None:
    captions = [["a cat", "the same cat, sleeping"], ["Ein Hund — 犬"], ["x\\n", "y", "z"]]
    dataset = open_captioned(RETRIEVAL, write_captioned(tmp_path / "set", captions))
    assert dataset.captions == captions and len(dataset.images) == 3


def test_class_folders_are_numbered_by_name_and_may_be_given_other_names(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "set", ["n02", "n01", "n10"], each=2)
    (folder / "test/n01/notes.txt").write_text("no image")
    (folder / "test/.hidden").mkdir()
    dataset = open_labelled(FOLDERS, folder)
    assert dataset.classnames == ["n01", "n02", "n10"] and dataset.label_N == [0, 0, 1, 1, 2, 2]
    for n, label in enumerate(labels_of(dataset)):
        assert dataset.images.name(n) == str(folder / "test" / label / f"{n % 2}.JPEG")
    (folder / "classnames.txt").write_text("tench\ngold fish\nshark\n")
    assert labels_of(open_labelled(FOLDERS, folder)) == ["tench"] * 2 + ["gold fish"] * 2 + ["shark"] * 2
    (folder / "classnames.txt").write_text("tench\ngold fish\n")
    with pytest.raises(DataError, match=r"classnames.txt: has 2 names for 3 folders"):
        open_labelled(FOLDERS, folder)


def test_a_split_called_dot_is_the_folder_itself(tmp_path: Path) -> None:
    write_image_folder(tmp_path, ["cat", "dog"], each=1, split="set")
    (tmp_path / "set/zeroshot_classification_templates.txt").write_text("{c}")
    assert open_labelled(Task("x", "zero_shot", "x", "image_folder", split="."), tmp_path / "set").label_N == [0, 1]


def test_questions_are_read_and_an_image_may_serve_several(tmp_path: Path) -> None:
    folder = write_choices(tmp_path / "set", QUESTIONS)
    dataset = open_choices(COMPOSITION, folder)
    assert dataset.category_N == ["replace_obj", "swap_att", "swap_att"]
    assert dataset.caption_N == ["a cat", "a red cat on a blue bed", "one"]
    assert dataset.negative_N == ["a dog", "a blue cat on a red bed", "two"]
    assert dataset.image_N == [0, 0, 1] and len(dataset.images) == 2
    assert [dataset.images.name(n) for n in (0, 1)] == [str(folder / "images" / name) for name in ("a.jpg", "bb.jpg")]
    chosen = open_choices(Task("x", "composition", "x", "sugarcrepe", categories=["swap_att"]), folder)
    assert chosen.category_N == ["swap_att", "swap_att"]


@pytest.mark.parametrize("count", [1, 3, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_world_size_makes_the_same_parts_each_image_once(tmp_path: Path, count: int, batch_size: int) -> None:
    dataset = open_labelled(ZERO_SHOT, write_labelled(tmp_path / "set", label_samples(count)))
    whole = [batch.indices_B.tolist() for batch in dataset.images.batches(0, 1, batch_size, SIZE)]
    assert [n for part in whole for n in part] == list(range(count))
    pixels = torch.cat([batch.images_BCHW for batch in dataset.images.batches(0, 1, batch_size, SIZE)])
    for world_size in (2, 3, 4):
        ranks = [list(dataset.images.batches(rank, world_size, batch_size, SIZE)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1, "ranks are out of step"
        rounds = [batch for together in zip(*ranks, strict=True) for batch in together]
        assert [batch.indices_B.tolist() for batch in rounds if len(batch.indices_B)] == whole
        for batch in rounds:
            assert torch.equal(batch.images_BCHW, pixels[batch.indices_B])
            assert batch.images_BCHW.shape == (len(batch.indices_B), 3, SIZE, SIZE)


def test_images_that_cannot_be_used_are_faults_of_their_part_with_the_file_s_name(tmp_path: Path) -> None:
    samples = label_samples(9)
    samples[1]["jpg"] = b"<html>not found</html>"
    samples[2]["jpg"] = samples[2]["jpg"][:-40]
    samples[6]["jpg"] = undecodable_jpeg(6)
    dataset = open_labelled(ZERO_SHOT, write_labelled(tmp_path / "set", samples))
    batches = list(dataset.images.batches(0, 1, 4, SIZE))
    assert [batch.indices_B.tolist() for batch in batches] == [[0, 3], [4, 5, 7], [8]]
    first, second = batches[0].faults
    assert first.startswith("test/0.tar/s0000001.jpg: html_page")
    assert second.startswith("test/0.tar/s0000002.jpg: truncated_image")
    (third,) = batches[1].faults
    assert third.startswith("test/1.tar/s0000006.jpg: decode_failed") and batches[2].faults == []


def test_a_file_that_is_gone_is_a_fault_with_its_name(tmp_path: Path) -> None:
    dataset = open_choices(COMPOSITION, write_choices(tmp_path / "set", QUESTIONS))
    (tmp_path / "set/images/bb.jpg").unlink()
    (batch,) = dataset.images.batches(0, 1, 4, SIZE)
    (fault,) = batch.faults
    assert batch.indices_B.tolist() == [0] and str(tmp_path / "set/images/bb.jpg") in fault


def test_opening_reads_no_image_and_closing_early_ends_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = TarImages.read
    monkeypatch.setattr(TarImages, "read", lambda self, index: read.append(index) or original(self, index))
    dataset = open_labelled(ZERO_SHOT, write_labelled(tmp_path / "set", label_samples(40)))
    assert read == []
    batches = dataset.images.batches(0, 1, 4, SIZE)
    next(batches)
    batches.close()
    assert set(range(4)) <= set(read) <= set(range(8)), "one part ahead, no more"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no classnames": (lambda f: (f / "classnames.txt").unlink(), "classnames.txt: is missing"),
    "no templates": (lambda f: (f / "zeroshot_classification_templates.txt").unlink(), "templates.txt: is missing"),
    "empty templates": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("\n"),
        "zeroshot_classification_templates.txt: line 1 is empty",
    ),
    "a gap among the templates": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c}\n\nthe {c}\n"),
        "zeroshot_classification_templates.txt: line 2 is empty",
    ),
    "a template without a place for the class": (
        lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {}\n"),
        r"zeroshot_classification_templates.txt: line 2 has no \{c\} for the class name: 'the \{\}'",
    ),
    "a gap among the classes": (
        lambda f: (f / "classnames.txt").write_text("cat\n\nriver bank\n"),
        "classnames.txt: line 2 is empty",
    ),
    "too few classes": (
        lambda f: (f / "classnames.txt").write_text("cat\ndog\n"),
        "test/0.tar/s0000002.cls: class 2 is out of range, .*classnames.txt names 2 classes",
    ),
    "no nshards": (lambda f: (f / "test/nshards.txt").unlink(), "nshards.txt: is missing"),
    "nshards is no number": (lambda f: (f / "test/nshards.txt").write_text("two"), "nshards.txt: 'two' is not a num"),
    "nshards says more": (lambda f: (f / "test/nshards.txt").write_text("12"), "test/3.tar: is missing, .* says 12"),
    "nshards says less": (lambda f: (f / "test/nshards.txt").write_text("2"), "says 2 shards, but there is also 2.tar"),
    "sizes disagree": (
        lambda f: (f / "test/sizes.json").write_text('{"0.tar": 4, "1.tar": 5, "2.tar": 2}'),
        "sizes.json: says 5 samples of 1.tar, which holds 4",
    ),
    "sizes are no JSON": (lambda f: (f / "test/sizes.json").write_text("{4"), "sizes.json: is not JSON"),
    "a shard is cut short": (lambda f: truncate(f / "test/1.tar"), "test/1.tar: cut short"),
    "a shard is empty": (lambda f: (f / "test/1.tar").write_bytes(b""), "test/1.tar: is an empty file"),
    "another type": (
        lambda f: (f / "dataset_type.txt").write_text("retrieval\n"),
        "dataset_type.txt: says 'retrieval', the task needs 'classification'",
    ),
    "another encoding": (lambda f: (f / "classnames.txt").write_bytes(b"caf\xe9\n"), "classnames.txt: is not UTF-8"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_what_is_wrong_with_a_set_is_told_in_one_line_with_the_file(
    tmp_path: Path, spoil: tuple[Callable[[Path], object], str]
) -> None:
    folder = write_labelled(tmp_path / "set", label_samples(10))
    assert len(open_labelled(ZERO_SHOT, folder).images) == 10
    spoil[0](folder)
    with pytest.raises(DataError, match=spoil[1]) as told:
        open_labelled(ZERO_SHOT, folder)
    assert str(told.value).startswith(str(folder)) and "\n" not in str(told.value)
    assert not isinstance(told.value, EvalSetMissingError)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"jpg": jpeg(0), "cls": b"3"}, "s0000000.cls: class 3 is out of range"),
        ({"jpg": jpeg(0), "cls": b"-1"}, "s0000000.cls: class -1 is out of range"),
        ({"jpg": jpeg(0), "cls": b"cat"}, "s0000000.cls: 'cat' is not a class number"),
        ({"jpg": jpeg(0), "cls": b"\xff"}, "s0000000.cls: is not UTF-8"),
        ({"jpg": jpeg(0)}, "s0000000: has no .cls member"),
        ({"bmp": jpeg(0), "cls": b"0"}, "s0000000: has no image, expected one of .webp, .png, .jpg, .jpeg"),
    ],
)
def test_what_is_wrong_with_a_sample_is_told_with_its_name(tmp_path: Path, members: dict, told: str) -> None:
    folder = write_labelled(tmp_path / "set", label_samples(2))
    write_tar(folder / "test/0.tar", [("s0000000", members)])
    with pytest.raises(DataError, match=told) as error:
        open_labelled(ZERO_SHOT, folder)
    assert str(error.value).startswith(f"{folder}/test/0.tar/s0000000")


def test_a_link_in_a_tar_is_not_taken_for_an_image(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", label_samples(2))
    with tarfile.open(folder / "test/0.tar", "a") as archive:
        for name, kind in (("t.jpg", tarfile.SYMTYPE), ("t.cls", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "s0000000.jpg" if kind == tarfile.SYMTYPE else ""
            member.size = 1 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"0"))
    with pytest.raises(DataError, match=r"test/0.tar/t.jpg: is a link"):
        open_labelled(ZERO_SHOT, folder)


@pytest.mark.parametrize("text", ["", "\n", " \n \n"])
def test_an_image_without_a_caption_is_told(tmp_path: Path, text: str) -> None:
    folder = write_captioned(tmp_path / "set", [["fine"], ["this one"]])
    write_tar(folder / "test/0.tar", [("k1", {"jpg": jpeg(0), "txt": text.encode()})])
    with pytest.raises(DataError, match="test/0.tar/k1.txt: holds no caption$"):
        open_captioned(RETRIEVAL, folder)


def test_empty_lines_are_no_captions(tmp_path: Path) -> None:
    folder = write_captioned(tmp_path / "set", [["a", "", "b", " "]])
    assert open_captioned(RETRIEVAL, folder).captions == [["a", "b"]]


def test_a_set_a_split_and_its_images_may_be_absent(tmp_path: Path) -> None:
    for open_set, task in ((open_labelled, ZERO_SHOT), (open_captioned, RETRIEVAL), (open_choices, COMPOSITION)):
        with pytest.raises(EvalSetMissingError, match="nowhere: there is no such folder"):
            open_set(task, tmp_path / "nowhere")
    folder = write_labelled(tmp_path / "set", label_samples(2))
    with pytest.raises(EvalSetMissingError, match="set/train: is missing, the set has no split 'train'"):
        open_labelled(PROBE, folder, "train")
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "swap_obj.json").write_text("{}")
    with pytest.raises(EvalSetMissingError, match="questions/images: the folder of images is missing"):
        open_choices(COMPOSITION, tmp_path / "questions")


QUESTION = {"filename": "a.jpg", "caption": "one", "negative_caption": "two"}


@pytest.mark.parametrize(
    ("questions", "told"),
    [
        ({"7": {**QUESTION, "filename": "z.jpg"}}, "x.json: the image of question 7 is missing: .*images/z.jpg"),
        ({"7": {**QUESTION, "negative_caption": "one"}}, "x.json: question 7 has the same text as caption and"),
        ({"7": {"filename": "a.jpg", "caption": "one"}}, "x.json: question 7 has no text as negative_caption"),
        ({"7": {**QUESTION, "caption": " "}}, "x.json: question 7 has no text as caption"),
        ({"7": "one"}, "x.json: question 7 has no text as filename"),
        ({}, "x.json: holds no questions"),
        ([QUESTION], "x.json: expected a JSON object"),
    ],
)
def test_what_is_wrong_with_a_question_is_told(tmp_path: Path, questions: object, told: str) -> None:
    folder = write_choices(tmp_path / "set", QUESTIONS)
    (folder / "x.json").write_text(json.dumps(questions))
    with pytest.raises(DataError, match=told):
        open_choices(COMPOSITION, folder)


def test_questions_without_images_or_without_files_are_told(tmp_path: Path) -> None:
    folder = write_choices(tmp_path / "set", QUESTIONS)
    with pytest.raises(DataError, match="set/val2017: the folder of images is missing"):
        open_choices(Task("x", "composition", "x", "sugarcrepe", images="val2017"), folder)
    with pytest.raises(DataError, match="set/add_obj.json: is missing"):
        open_choices(Task("x", "composition", "x", "sugarcrepe", categories=["add_obj"]), folder)
    with pytest.raises(DataError, match="images: holds no JSON files"):
        open_choices(COMPOSITION, folder / "images")


def test_a_class_folder_without_images_is_told(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "set", ["cat", "dog"], each=1)
    (folder / "test/cow").mkdir()
    with pytest.raises(DataError, match="test/cow: holds no images"):
        open_labelled(FOLDERS, folder)


def test_two_samples_of_one_name_are_told(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "set", label_samples(2))
    members = {"jpg": jpeg(0), "cls": b"0"}
    write_tar(folder / "test/0.tar", [("k1", members), ("k2", members), ("k1", members)])
    with pytest.raises(DataError, match="test/0.tar: two samples are called k1$"):
        open_labelled(ZERO_SHOT, folder)
