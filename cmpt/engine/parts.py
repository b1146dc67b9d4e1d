"""The tensors of a checkpoint in files: each rank writes what it holds, any rank of any world size reads what it needs.

`part-00003-of-00008.safetensors` is what rank 3 of 8 held: one flat fp32 piece "<kind>/<parameter>" for every parameter
that it had a piece of, and in the header, as JSON, where the piece begins in the flattened parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmpt.engine.manifest import STATE, CheckpointError, listed_files


def part_name(rank: int, world_size: int) -> str:
    return f"part-{rank:05d}-of-{world_size:05d}.safetensors"


def write_part(path: Path, starts: Mapping[str, int], tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """`starts`: where the piece of each parameter begins; `tensors`: by kind, the pieces in the order of `starts`."""
    flat = {
        f"{kind}/{name}": piece for kind, pieces in tensors.items() for name, piece in zip(starts, pieces, strict=True)
    }
    save_file(flat, path, {"starts": json.dumps(starts)})


class Parts:
    """The tensors of a verified checkpoint. Raises CheckpointError where a file is not what it should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / STATE).read_text())
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in self.state.pop("parameters").items()}
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # "<kind>/<name>" -> (start, end, open file)
        for path in (folder / name for name in listed_files(folder) if name.endswith(".safetensors")):
            try:
                file = safe_open(path, "pt")
                starts = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    start = starts[key.partition("/")[2]]
                    end = start + file.get_slice(key).get_shape()[0]
                    self._pieces.setdefault(key, []).append((start, end, file))
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error})") from error

    def has(self, kind: str) -> bool:
        """Whether there is anything of this kind, e.g. "ema"."""
        return any(key.startswith(f"{kind}/") for key in self._pieces)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start … start + numel - 1 of a flattened parameter [numel], fp32."""
        result = torch.empty(numel)
        filled = 0
        for first, last, file in self._pieces.get(f"{kind}/{name}", ()):
            low, high = max(start, first), min(start + numel, last)
            if low < high:
                result[low - start : high - start] = file.get_slice(f"{kind}/{name}")[low - first : high - first]
                filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.folder}: {filled} of {numel} elements of {kind}/{name} are there")
        return result

    def full(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind by parameter name, in their shapes."""
        return {name: self.read(kind, name, 0, math.prod(shape)).view(shape) for name, shape in self.shapes.items()}
