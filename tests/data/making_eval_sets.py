"""Evaluation sets, made in the test that reads them; the tars by webdataset's own writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import webdataset
from data.making import jpeg

CLASSES = ["cat", "dog", "river bank"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}."]


def write_split(folder: Path, samples: Sequence[dict[str, Any]], per_shard: int = 4) -> None:
    """0.tar, 1.tar, ... and nshards.txt, as CLIP_benchmark's exporter writes them."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%d.tar", maxcount=per_shard, verbose=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"s{number:07d}", **sample})
        shards = writer.shard
    (folder / "nshards.txt").write_text(f"{shards}\n")


def label_samples(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"jpg": jpeg(n), "cls": n % len(CLASSES)} for n in range(first, first + count)]


def write_labelled(folder: Path, samples: Sequence[dict[str, Any]], split: str = "test", per_shard: int = 4) -> Path:
    write_split(folder / split, samples, per_shard)
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def write_captioned(folder: Path, captions: Sequence[Sequence[str]]) -> Path:
    write_split(folder / "test", [{"jpg": jpeg(n), "txt": "\n".join(texts)} for n, texts in enumerate(captions)])
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def write_choices(folder: Path, questions: dict[str, Sequence[tuple[str, str, str]]]) -> Path:
    """`questions`: category -> (image file, caption, negative caption) of each; the images are made too."""
    (folder / "images").mkdir(parents=True)
    for category, entries in questions.items():
        names = ("filename", "caption", "negative_caption")
        rows = {str(10 * n): dict(zip(names, entry, strict=True)) for n, entry in enumerate(entries)}
        (folder / f"{category}.json").write_text(json.dumps(rows, indent=4))
        for filename, _, _ in entries:
            (folder / "images" / filename).write_bytes(jpeg(len(filename)))
    return folder


def write_image_folder(folder: Path, classes: Sequence[str], each: int, split: str = "test") -> Path:
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for n in range(each):
            (folder / split / name / f"{n}.JPEG").write_bytes(jpeg(10 * label + n))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder
