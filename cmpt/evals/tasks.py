"""The tasks of a suite: their sets opened, then each evaluated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cmpt.data.eval_sets import (
    CaptionedSet,
    ChoiceSet,
    EvalSetMissingError,
    LabelledSet,
    open_captioned,
    open_choices,
    open_labelled,
)
from cmpt.data.validate import DataError
from cmpt.dist.process_group import broadcast_object
from cmpt.evals.composition import composition
from cmpt.evals.embed import Encoder
from cmpt.evals.linear_probe import Features, linear_probe
from cmpt.evals.retrieval import recalls
from cmpt.evals.zero_shot import class_embeddings, zero_shot
from cmpt.recipe.suite import Suite, Task
from cmpt.recipe.typed import nearest_choice


@dataclass(frozen=True)
class OpenedTask:
    """A task with what it is evaluated on; a linear probe also with what it is fitted and chosen on."""

    task: Task
    test: LabelledSet | CaptionedSet | ChoiceSet
    train: LabelledSet | None = None
    validation: LabelledSet | None = None


def open_tasks(suite: Suite, data: Path, chosen: Sequence[str] = ()) -> tuple[list[OpenedTask], dict[str, str]]:
    """The tasks whose sets lie below `data`, in the suite's order, and why the others are left out, by name.

    `chosen`: the names of the tasks that are wanted; empty: all. Raises DataError where a set is there but not as it
    should be, or where the suite has no such task.
    """
    names = [task.name for task in suite.tasks]
    for name in chosen:
        if name not in names:
            raise DataError(f"the suite has no task {name}: {nearest_choice(name, names)}")
    opened, absent = [], {}
    for task in suite.tasks:
        if chosen and task.name not in chosen:
            continue
        try:
            opened.append(_open(task, task.folder(data)))
        except EvalSetMissingError as error:
            absent[task.name] = str(error)
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
    return opened, absent


def _open(task: Task, folder: Path) -> OpenedTask:
    if task.kind == "retrieval":
        return OpenedTask(task, open_captioned(task, folder))
    if task.kind == "composition":
        return OpenedTask(task, open_choices(task, folder))
    test = open_labelled(task, folder)
    if task.kind == "zero_shot":
        return OpenedTask(task, test)
    splits = [task.train_split] + ([task.validation_split] if task.validation_split else [])
    others = [open_labelled(task, folder, split) for split in splits]
    for split, other in zip(splits, others, strict=True):
        if other.classnames != test.classnames:
            raise DataError(f"{folder}: the classes of {split} are not those of {task.split}")
    return OpenedTask(task, test, *others)


def run_task(opened: OpenedTask, encoder: Encoder) -> dict[str, float]:
    """Results by name: fractions, and the sizes of the set. All ranks call it and get the same.

    Raises DataError, on all ranks alike, where an image cannot be read.
    """
    test = opened.test
    if isinstance(test, CaptionedSet):
        captions = [caption for captions in test.captions for caption in captions]
        captions_of = [len(captions) for captions in test.captions]
        image_NE, text_ME = encoder.images(test.images), encoder.texts(captions)
        return recalls(image_NE, text_ME, captions_of, encoder.rank, encoder.world_size)
    if isinstance(test, ChoiceSet):
        image_NE = encoder.images(test.images)[torch.tensor(test.image_N)]
        caption_NE, negative_NE = encoder.texts(test.caption_N), encoder.texts(test.negative_N)
        return composition(image_NE, caption_NE, negative_NE, test.category_N)
    if opened.task.kind == "zero_shot":
        class_CE = class_embeddings(encoder, test.classnames, test.templates)
        return zero_shot(encoder.images(test.images), class_CE, test.label_N)
    assert opened.train is not None
    began = time.perf_counter()
    features = [
        None if one is None else Features(encoder.images(one.images, tower=True), torch.tensor(one.label_N))
        for one in (opened.train, test, opened.validation)
    ]
    features_s = time.perf_counter() - began
    # One rank fits; the others would get the same.
    found = linear_probe(*features) if encoder.rank == 0 else None  # type: ignore[arg-type]
    return broadcast_object(found) | {"classes": len(test.classnames), "features_s": features_s}
