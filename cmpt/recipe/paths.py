"""Paths in recipes: relative to the current directory, or `pkg:` for what is shipped inside the package. Torch-free."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

from braceexpand import braceexpand

PACKAGE = Path(__file__).resolve().parent.parent
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # http:, s3:, gs:, pipe:


def resolve_path(path: str) -> str:
    """A path or URL of a recipe as the file system knows it.

    `pkg:data/x` becomes the absolute path of data/x inside the installed cmpt package, `~` the home folder and
    `file:/x` the plain path /x; other URLs and relative paths come back as they are. Braces are left alone.
    """
    if path.startswith("pkg:"):
        return str(PACKAGE / path.removeprefix("pkg:"))
    if path.startswith("file:"):
        return re.sub(r"^file:(//)?", "", path)
    return os.path.expanduser(path)


def expand_shards(pattern: str) -> list[str]:
    """The shards that a pattern of a recipe names: brace expansion, and in paths the wildcards * ? [...], sorted.

    Raises ValueError for unbalanced braces; wildcards that match nothing give nothing.
    """
    shards: list[str] = []
    for url in braceexpand(pattern):
        path = resolve_path(url)
        if is_local(path) and has_magic(path) and not os.path.exists(path):
            shards += sorted(glob(path))
        else:
            shards.append(path)
    return shards


def is_local(path: str) -> bool:
    """Whether `path` names a file on this machine rather than a URL or a pipe."""
    return path.startswith(("pkg:", "file:")) or not _SCHEME.match(path)
