"""Paths in recipes: relative to the current directory, or `pkg:` for what is shipped inside the package. Torch-free."""

from __future__ import annotations

import os
import re
from pathlib import Path

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


def is_local(path: str) -> bool:
    """Whether `path` names a file on this machine rather than a URL or a pipe."""
    return path.startswith(("pkg:", "file:")) or not _SCHEME.match(path)
