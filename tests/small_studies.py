"""Study files for the tests of scaling studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY

from scaling_study import Study, load_study

RECIPE = str(REPOSITORY / "recipes/quickstart.yaml")
LOCAL: dict[str, Any] = {"recipe": RECIPE, "processes": [1, 2], "weak": [16], "sweep": {"engine.zero_stage": [1, 3]}}


def study_file(folder: Path, **keys: Any) -> Path:
    path = folder / "study.yaml"
    tree = {**LOCAL, "folder": str(folder), **keys}
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


def study(folder: Path, **keys: Any) -> Study:
    return load_study(study_file(folder, **keys))
