"""What makes the shards of a recipe impossible, found before anything starts. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from cmpt.recipe.paths import expand_shards, is_local
from cmpt.recipe.schema import Data
from cmpt.recipe.typed import Absent

REMOTE_SCHEMES = ("http:", "https:", "s3:", "gs:", "pipe:")
Fault = tuple[str, Any, str]  # dotted key, value, constraint


def data_faults(data: Data) -> Iterator[Fault]:
    """Of the sources and their samples; ranges and choices of single fields are check.py's."""
    if not any(source.urls for source in data.train):
        yield "data.train", data.train, "must name at least one shard of training pairs"
    for index, source in enumerate(data.train):
        key = f"data.train.{index}"
        if not (math.isfinite(source.weight) and source.weight > 0):
            yield f"{key}.weight", source.weight, "must be > 0"
        if not source.urls:
            yield f"{key}.urls", source.urls, "must not be empty"
        for url in source.urls:
            yield from _shard_faults(f"{key}.urls", url, data)
    for url in data.heldout:
        yield from _shard_faults("data.heldout", url, data)
    if not data.image_extensions:
        yield "data.image_extensions", data.image_extensions, "must not be empty"
    for extension in data.image_extensions:
        if extension[:1] == ".":
            yield "data.image_extensions", extension, "must not begin with a dot"
    if data.caption_extension == "json" and data.caption_field == "":
        yield "data.caption_field", "", "must not be empty"


def _shard_faults(key: str, url: str, data: Data) -> Iterator[Fault]:
    """Local shards exist; the folders are listed once, which is quicker than a look at each of many shards."""
    try:
        shards = expand_shards(url)
    except ValueError:
        yield key, url, "has unbalanced braces"
        return
    if not shards:
        yield key, url, Absent(f"matches no file; give your own: {key}=[...]")
        return
    remote = [shard for shard in shards if not is_local(shard)]
    unknown = [shard for shard in remote if not shard.lower().startswith(REMOTE_SCHEMES)]
    if unknown:
        yield key, url, f"must be a path or one of {', '.join(REMOTE_SCHEMES)} got {unknown[0]}"
    elif remote and data.cache == "never":
        yield key, url, 'must be a path with data.cache = "never": shards behind URLs are read from the cache only'
    elif any(shard[:5].lower() == "pipe:" for shard in remote) and not data.allow_pipe:
        yield key, url, "hands a command to a shell: needs data.allow_pipe=true"
    paths = [shard for shard in shards if is_local(shard)]
    folders: dict[str, set[str]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
    missing = [path for path in paths if os.path.basename(path) not in folders[os.path.dirname(path)]]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        counted = f"{len(missing)} of {len(shards)} shards do not exist" if len(shards) > 1 else "no such file"
        hint = f"; give your own: {key}=[...]" if len(missing) == len(shards) else ""
        yield key, url, Absent(f"{counted}: {first}{hint}")
