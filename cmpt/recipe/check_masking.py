"""What makes the masking of a recipe, or of one of its phases, impossible. Torch-free."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from cmpt.recipe.paths import resolve_path
from cmpt.recipe.schema import Masking, Recipe, TextMasking
from cmpt.recipe.typed import Absent

MOST_PATCHES = 1 << 12  # of an image that is cluster masked (masking/cluster.py)
Fault = tuple[str, Any, str]  # dotted key, value, constraint


def masking_faults(recipe: Recipe) -> Iterator[Fault]:
    """Of image masking; ranges and choices of single fields are check.py's."""
    masking, strategy = recipe.masking, f'with masking.strategy = "{recipe.masking.strategy}"'
    if masking.strategy == "scores":
        if not re.fullmatch(r"[\w.]+:\w+", masking.scores or ""):
            yield "masking.scores", masking.scores, f'must name a function as "module:name" {strategy}'
    elif masking.scores is not None:
        yield "masking.scores", masking.scores, f"must be null {strategy}"
    if masking.strategy == "grid":
        for key, ratio in (("masking.ratio", masking.ratio), ("masking.ratio_end", masking.ratio_end)):
            if ratio not in (0.75, None):
                yield key, ratio, f"must be 0.75 {strategy}: one patch of four stays"
    if masking.strategy == "cluster":
        yield from _min_ratio_faults(masking)
        yield from _anchor_faults(recipe)


def _min_ratio_faults(masking: Masking) -> Iterator[Fault]:
    """β must not exceed the target at either end of the phase; in between both are linear."""
    if masking.min_ratio > masking.ratio:
        yield "masking.min_ratio", masking.min_ratio, f"must be <= masking.ratio = {masking.ratio}"
        return
    if masking.ratio_end is None and masking.min_ratio_end is None:
        return
    ratio, its_key = (masking.ratio_end, "ratio_end") if masking.ratio_end is not None else (masking.ratio, "ratio")
    least, key = masking.min_ratio_end, "min_ratio_end"
    if least is None:
        least, key = masking.min_ratio, "min_ratio"
    if least > ratio:
        yield f"masking.{key}", least, f"must be <= masking.{its_key} = {ratio}"


def _anchor_faults(recipe: Recipe) -> Iterator[Fault]:
    masking, size, patch = recipe.masking, recipe.image.size, recipe.model.patch_size
    patches = (size // patch) ** 2 if patch else None
    if patches is not None and patches > MOST_PATCHES:
        constraint = f'must give at most {MOST_PATCHES} patches with masking.strategy = "cluster", gives {patches}'
        yield "image.size", size, constraint
    if patches is not None and masking.threshold is None:
        yield from _reach_faults(masking, patches)
    if masking.anchors is None:
        return
    if masking.anchor_ratio_end is not None:
        yield "masking.anchor_ratio_end", masking.anchor_ratio_end, "must be null where masking.anchors is given"
    if patches is not None and masking.anchors >= patches:
        yield "masking.anchors", masking.anchors, f"must be < {patches}, the patches of an image of {size} pixels"


def _reach_faults(masking: Masking, patches: int) -> Iterator[Fault]:
    """A target below what anchors or β hide anyhow would never be reached."""
    for end in ("", "_end"):
        ratio, least = _at(masking, "ratio", end), _at(masking, "min_ratio", end)
        by_anchors = masking.anchors or int(_at(masking, "anchor_ratio", end) * patches + 1e-9)
        by_least = math.ceil(least * patches * (1 - 1e-9)) if least <= ratio else 0  # above it: told already
        anchors = f"anchor_ratio{end}" if masking.anchors is None else "anchors"
        for field, hidden in ((anchors, by_anchors), (f"min_ratio{end}", by_least)):
            value = getattr(masking, field)
            if value is not None and max(1, ratio * patches + 1e-9) < hidden < patches:
                constraint = f"must hide at most masking.ratio = {ratio} of the patches, hides {hidden} of {patches}"
                yield f"masking.{field}", value, constraint


def _at(masking: Masking, name: str, end: str) -> float:
    """A scheduled field at the beginning ("") or the end ("_end") of the phase."""
    last = getattr(masking, f"{name}_end") if end else None
    return float(getattr(masking, name) if last is None else last)


def text_masking_faults(recipe: Recipe) -> Iterator[Fault]:
    """Of text masking; ranges and choices of single fields are check.py's."""
    text, context = recipe.text_masking, recipe.model.context_length
    strategy = f'with text_masking.strategy = "{text.strategy}"'
    if (text.tokens is not None) != (text.strategy != "none"):
        yield "text_masking.tokens", text.tokens, f"must be {'null' if text.strategy == 'none' else 'given'} {strategy}"
    elif text.tokens is not None and text.tokens > context:
        yield "text_masking.tokens", text.tokens, f"must be <= model.context_length = {context}"
    if text.strategy == "frequency":
        yield from _frequency_faults(text, strategy)


def _frequency_faults(text: TextMasking, strategy: str) -> Iterator[Fault]:
    if text.frequencies is None:
        yield "text_masking.frequencies", None, f"must name the table that tools/count_words.py writes, {strategy}"
    elif not os.path.isfile(resolve_path(text.frequencies)):
        yield "text_masking.frequencies", text.frequencies, Absent("no such file")
