"""Evaluation sets as others publish them: images with labels, with captions, or with a true and a false caption.

Three formats. webdataset: a folder as CLIP_benchmark and DataComp publish them, with classnames.txt and
zeroshot_classification_templates.txt (one a line), dataset_type.txt ("retrieval" or "classification", which is meant
where the file is absent), and per split a folder with nshards.txt and 0.tar, 1.tar, ... of images with a .cls (class
number) or a .txt (one caption a line). image_folder: a folder per class. sugarcrepe: JSON files of questions, each with
`filename`, `caption` and `negative_caption`, beside a folder of images.

Labels, captions and JSON are read when a set is opened; image bytes only when batches come.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.data.decode import heldout_pixels
from cmpt.data.eval_files import (
    IMAGE_SUFFIXES,
    FileImages,
    Shard,
    Store,
    TarImages,
    open_split,
    read_json,
    read_lines,
    read_members,
    read_text,
)
from cmpt.data.validate import DataError, UnusableError, examine_image
from cmpt.recipe.schema import Data
from cmpt.recipe.suite import Task

CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
PLACEHOLDER = "{c}"
"""Where a class name goes in a prompt."""
_MAX_PIXELS = Data().max_image_pixels
_THREADS = min(4, os.cpu_count() or 1)


class EvalSetMissingError(DataError):
    """The folder of a set, of its split or of its images is not there at all."""


@dataclass(frozen=True)
class EvalBatch:
    """B images of a set; B may be 0 and differ from batch to batch."""

    images_BCHW: Tensor  # uint8
    indices_B: Tensor  # int64; places in the set
    faults: list[str]  # images of this part that cannot be read or decoded, "FILE: what is wrong"; not in the batch


class EvalImages:
    """N images of an evaluation set in a fixed order."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def name(self, index: int) -> str:
        """What an error calls an image: "test/3.tar/s0000012.jpg" or a path."""
        return self._store.name(index)

    def batches(self, rank: int, world_size: int, batch_size: int, size: int) -> Iterator[EvalBatch]:
        """This rank's parts of the set, as uint8 pixels [B, 3, size, size], decoded one part ahead.

        Part j holds images j * batch_size … (j + 1) * batch_size - 1, and rank r takes parts r, r + world_size, ...:
        what is computed together does not depend on the world size. Every rank yields the same number of batches; one
        without a part in the last round yields an empty batch.

        RGB and grey images without EXIF have the pixels of open_clip's evaluation transform but for rounding: at most
        1 of 255, 0.003 to 0.006 in the mean. Four differ on purpose: what is transparent is white, EXIF's orientation
        is followed, palettes become colours before the size changes, and 16 bits of grey become 8 instead of white.
        """
        rounds = -(-len(self) // (world_size * batch_size))
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="cmpt-eval")
        try:
            decoding: tuple[range, list[Future[NDArray[np.uint8] | str]]] | None = None
            for part in range(rank, rounds * world_size, world_size):
                indices = range(len(self))[part * batch_size : (part + 1) * batch_size]
                upcoming = [pool.submit(self._pixels, index, size) for index in indices]
                if decoding is not None:
                    yield _batch(*decoding, size)
                decoding = (indices, upcoming)
            if decoding is not None:
                yield _batch(*decoding, size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pixels(self, index: int, size: int) -> NDArray[np.uint8] | str:
        """One image [3, size, size], or what is wrong with it."""
        try:
            data = self._store.read(index)
            return heldout_pixels(data, examine_image(data, _MAX_PIXELS), size)
        except (OSError, UnusableError) as error:
            return f"{self.name(index)}: {error}"


def _batch(indices: range, tasks: list[Future[NDArray[np.uint8] | str]], size: int) -> EvalBatch:
    views = [task.result() for task in tasks]
    good = [(index, view) for index, view in zip(indices, views, strict=True) if not isinstance(view, str)]
    images_BCHW = np.empty((len(good), 3, size, size), dtype=np.uint8)
    for b, (_, view) in enumerate(good):
        images_BCHW[b] = view
    return EvalBatch(
        images_BCHW=torch.from_numpy(images_BCHW),
        indices_B=torch.tensor([index for index, _ in good], dtype=torch.int64),
        faults=[view for view in views if isinstance(view, str)],
    )


@dataclass(frozen=True)
class LabelledSet:
    """Images of known classes."""

    images: EvalImages
    label_N: list[int]  # places in `classnames`
    classnames: list[str]
    templates: list[str]  # prompts that hold {c} where the class name goes; may be empty for a linear probe
    class_folders: list[str] = field(default_factory=list)  # of an image folder, in the order of the labels


@dataclass(frozen=True)
class CaptionedSet:
    """Images with their captions."""

    images: EvalImages
    captions: list[list[str]]  # of each image, at least one


@dataclass(frozen=True)
class ChoiceSet:
    """Questions: which of two captions is that of the image?"""

    images: EvalImages
    image_N: list[int]  # place of each question's image; an image may serve several questions
    caption_N: list[str]
    negative_N: list[str]
    category_N: list[str]


def open_labelled(task: Task, folder: Path, split: str | None = None) -> LabelledSet:
    """The images of `split` (None: task.split) and their classes; `folder` is task.folder(data).

    Class folders are numbered in the order of their names, as torchvision's ImageFolder does; where there is a
    classnames.txt its lines name them in that order, else they name themselves. So two splits of an image folder agree
    in their labels only if their `class_folders` are equal.
    Raises DataError, EvalSetMissingError.
    """
    place = _split_folder(folder, task.split if split is None else split)
    templates = _templates(folder, required=task.kind == "zero_shot")
    if task.format == "image_folder":
        classes = _class_folders(place)
        classnames = read_lines(folder / CLASSNAMES) if (folder / CLASSNAMES).exists() else list(classes)
        if len(classnames) != len(classes):
            raise DataError(f"{folder / CLASSNAMES}: has {len(classnames)} names for {len(classes)} folders in {place}")
        paths = [path for files in classes.values() for path in files]
        labels = [label for label, files in enumerate(classes.values()) for _ in files]
        return LabelledSet(EvalImages(FileImages(paths)), labels, classnames, templates, list(classes))
    _check_type(folder, "classification")
    classnames = read_lines(folder / CLASSNAMES)
    shards = open_split(place)
    images = EvalImages(TarImages(folder, shards))
    labels = [label for shard in shards for label in _labels(shard, classnames, folder / CLASSNAMES)]
    return LabelledSet(images, labels, classnames, templates)


def open_captioned(task: Task, folder: Path) -> CaptionedSet:
    """The images of task.split and their captions, one a line, in the order given.

    A caption that held a line break has the two characters "\\n" there: so CLIP_benchmark writes it, and so its reader
    leaves it. Raises DataError, EvalSetMissingError.
    """
    place = _split_folder(folder, task.split)
    _check_type(folder, "retrieval")
    shards = open_split(place)
    images = EvalImages(TarImages(folder, shards))
    captions = [lines for shard in shards for lines in _captions(shard)]
    return CaptionedSet(images, captions)


def open_choices(task: Task, folder: Path) -> ChoiceSet:
    """The questions of all of SugarCrepe's JSON files in `folder`, or of task.categories.

    The JSON's name is the category. Raises DataError, EvalSetMissingError.
    """
    _check_there(folder)
    files = [folder / f"{name}.json" for name in task.categories] or sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"{folder}: holds no JSON files of questions")
    image_folder = folder / task.images
    if not image_folder.is_dir():
        raise EvalSetMissingError(f"{image_folder}: the folder of images is missing")
    place_of: dict[str, int] = {}
    questions = []
    for file in files:
        if file.stem in _RESULTS:
            raise DataError(f"{file}: a category cannot be called {file.stem}, a result has this name")
        entries = read_json(file)
        if not entries:
            raise DataError(f"{file}: holds no questions")
        for key, entry in entries.items():
            filename, caption, negative = (_field(entry, name, key, file) for name in _QUESTION)
            if caption == negative:
                raise DataError(f"{file}: question {key} has the same text as caption and as negative_caption")
            if filename not in place_of and not (image_folder / filename).is_file():
                raise DataError(f"{file}: the image of question {key} is missing: {image_folder / filename}")
            place = place_of.setdefault(filename, len(place_of))
            questions.append((place, caption, negative, file.stem))
    image_N, caption_N, negative_N, category_N = (list(column) for column in zip(*questions, strict=True))
    images = EvalImages(FileImages([image_folder / name for name in place_of]))
    return ChoiceSet(images, image_N, caption_N, negative_N, category_N)


_QUESTION = ("filename", "caption", "negative_caption")
_RESULTS = ("accuracy", "samples", "seconds")


def _field(entry: object, name: str, key: str, file: Path) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{file}: question {key} has no text as {name}")
    return value


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise EvalSetMissingError(f"{folder}: there is no such folder")


def _split_folder(folder: Path, split: str) -> Path:
    _check_there(folder)
    if not (folder / split).is_dir():
        raise EvalSetMissingError(f"{folder / split}: is missing, the set has no split {split!r}")
    return folder / split


def _check_type(folder: Path, expected: str) -> None:
    """The type that a set itself states; where it states none, the task is believed."""
    path = folder / TYPE
    if path.exists() and (stated := read_text(path).strip().lower()) != expected:
        raise DataError(f"{path}: says {stated!r}, the task needs {expected!r}")


def _templates(folder: Path, required: bool) -> list[str]:
    path = folder / TEMPLATES
    if not required and not path.exists():
        return []
    templates = read_lines(path)
    for number, template in enumerate(templates, 1):
        if PLACEHOLDER not in template:
            raise DataError(f"{path}: line {number} has no {PLACEHOLDER} for the class name: {template[:80]!r}")
    return templates


def _class_folders(place: Path) -> dict[str, list[Path]]:
    """Class name -> its images, both in the order of their names; images may lie in folders of the class's folder."""
    classes = {}
    for folder in sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise DataError(f"{folder}: holds no images ({' '.join(IMAGE_SUFFIXES)})")
        classes[folder.name] = files
    if not classes:
        raise DataError(f"{place}: holds no class folders")
    return classes


def _labels(shard: Shard, classnames: list[str], path: Path) -> Iterator[int]:
    for sample, text in zip(shard.samples(), read_members(shard, "cls"), strict=True):
        name = f"{shard.path}/{sample.key}.cls"
        try:
            label = int(text)
        except ValueError as error:
            raise DataError(f"{name}: {text[:50]!r} is not a class number") from error
        if not 0 <= label < len(classnames):
            raise DataError(f"{name}: class {label} is out of range, {path} names {len(classnames)} classes")
        yield label


def _captions(shard: Shard) -> Iterator[list[str]]:
    for sample, text in zip(shard.samples(), read_members(shard, "txt"), strict=True):
        captions = [line.strip() for line in text.splitlines() if line.strip()]
        if not captions:
            raise DataError(f"{shard.path}/{sample.key}.txt: holds no caption")
        yield captions
