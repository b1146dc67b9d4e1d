"""open_clip for the tools that compare with it or confirm an export by it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

_kept: list[Any] = []


def import_open_clip() -> ModuleType:
    """The module open_clip. Raises ModuleNotFoundError that says what to install."""
    for module in ("open_clip", "torchvision", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{module} is not installed: pip install -e '.[open-clip]' in cmpt's folder")
    if torch.version.cuda is None and not _kept:
        # torchvision's package is a CUDA build, whose import on a CPU-only torch needs these two to be declared.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # what a library defines lives as long as it does
    return importlib.import_module("open_clip")
