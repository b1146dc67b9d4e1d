"""Evaluation sets as others publish them: images with labels, with captions, or with a true and a false caption.

Labels, captions and JSON are read when a set is opened; image bytes only when batches come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cmpt.data.validate import DataError
from cmpt.recipe.suite import Task


class EvalSetMissingError(DataError):
    """The folder of a set is not there at all."""


@dataclass(frozen=True)
class EvalBatch:
    """B images of a set; B may be 0 and differ from batch to batch."""

    images_BCHW: Tensor  # uint8
    indices_B: Tensor  # int64; places in the set
    faults: list[str]  # images of this part that cannot be read or decoded, "FILE: what is wrong"; not in the batch


class EvalImages:
    """N images of an evaluation set in a fixed order."""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What an error calls an image: "test/3.tar/s0000012.jpg" or a path."""
        raise NotImplementedError

    def batches(self, rank: int, world_size: int, batch_size: int, size: int) -> Iterator[EvalBatch]:
        """This rank's parts of the set, as uint8 pixels [B, 3, size, size]."""
        raise NotImplementedError


@dataclass(frozen=True)
class LabelledSet:
    """Images of known classes."""

    images: EvalImages
    label_N: list[int]  # places in `classnames`
    classnames: list[str]
    templates: list[str]  # prompts that hold {c} where the class name goes; may be empty for a linear probe


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
    """The images of `split` (None: task.split) and their classes. Raises DataError, EvalSetMissingError."""
    raise NotImplementedError


def open_captioned(task: Task, folder: Path) -> CaptionedSet:
    """The images of task.split and their captions. Raises DataError, EvalSetMissingError."""
    raise NotImplementedError


def open_choices(task: Task, folder: Path) -> ChoiceSet:
    """The questions of SugarCrepe's JSON files. Raises DataError, EvalSetMissingError."""
    raise NotImplementedError
