"""The tasks of a suite: their sets opened, then each evaluated."""

from __future__ import annotations

import socket
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
from cmpt.dist.process_group import gather_objects, on_first_rank
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

    `chosen`: the names of the tasks that are wanted; empty: all that are there. All ranks call it. Raises DataError, on
    all ranks alike, where a set is there but not as it should be, a chosen one is not there, none is there, or some
    hosts have one that others have not.
    """
    opened: list[OpenedTask] = []
    absent: dict[str, str] = {}
    fault = None
    try:
        _open_all(suite, data, chosen, opened, absent)
    except DataError as error:
        fault = str(error)
    views = gather_objects((socket.gethostname(), [one.task.name for one in opened], fault))
    for _, _, fault in views:
        if fault:
            raise DataError(fault)
    for host, names, _ in views:
        for other, others, _ in views:
            if lost := [name for name in others if name not in names]:
                raise DataError(f"{data}: the set of task {lost[0]} is there on host {other}, but not on {host}")
    return opened, absent


def _open_all(
    suite: Suite, data: Path, chosen: Sequence[str], opened: list[OpenedTask], absent: dict[str, str]
) -> None:
    names = [task.name for task in suite.tasks]
    for name in chosen:
        if name not in names:
            raise DataError(f"the suite has no task {name}: {nearest_choice(name, names)}")
    if not data.is_dir():
        raise DataError(f"{data}: the folder of the evaluation sets is missing")
    for task in suite.tasks:
        if chosen and task.name not in chosen:
            continue
        try:
            opened.append(_open(task, task.folder(data)))
        except EvalSetMissingError as error:
            if task.name in chosen:
                raise DataError(f"task {task.name}: {error}") from error
            absent[task.name] = str(error)
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
    if not opened:
        raise DataError(f"{data}: none of the suite's sets is there: {'; '.join(absent.values())}")


def _open(task: Task, folder: Path) -> OpenedTask:
    if task.kind == "retrieval":
        return OpenedTask(task, open_captioned(task, folder))
    if task.kind == "composition":
        choices = open_choices(task, folder)
        results = ["accuracy", *dict.fromkeys(choices.category_N)]
        if task.metric is not None and task.metric not in results:
            raise DataError(f"metric {task.metric}: {nearest_choice(task.metric, results)}")
        return OpenedTask(task, choices)
    test = open_labelled(task, folder)
    if task.kind == "zero_shot":
        return OpenedTask(task, test)
    splits = [task.train_split] + ([task.validation_split] if task.validation_split else [])
    others = [open_labelled(task, folder, split) for split in splits]
    for split, other in zip(splits, others, strict=True):
        if (other.classnames, other.class_folders) != (test.classnames, test.class_folders):
            raise DataError(f"{folder}: the classes of {split} are not those of {task.split}")
    if len(set(others[0].label_N)) < 2:
        raise DataError(f"{folder / task.train_split}: a probe needs two classes, all images here are of one")
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
    sets = [one for one in (opened.train, test, opened.validation) if one is not None]
    features = [Features(encoder.images(one.images, tower=True), torch.tensor(one.label_N)) for one in sets]
    features_s = time.perf_counter() - began

    def fit() -> dict[str, float]:
        return linear_probe(*features) | {"classes": len(test.classnames), "features_s": features_s}

    try:
        return on_first_rank(fit, encoder.beat)
    except ValueError as error:
        raise DataError(f"task {opened.task.name}: {error}") from error
