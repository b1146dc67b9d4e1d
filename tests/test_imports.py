"""Imports point one way, and each heavy library has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).parents[1]

# train -> remedies | evaluations -> engine | evals | monitor -> data | masking | losses | models -> ops | dist
# -> recipe, batch
LAYERS: tuple[tuple[str, ...], ...] = (
    ("train",),
    ("remedies", "evaluations"),
    ("engine", "evals", "monitor"),
    ("data", "masking", "losses", "models"),
    ("ops", "dist"),
    ("recipe", "batch"),
)
# Every part may import the parts of lower layers and itself, never one of its own layer. cmpt/__init__.py imports none.
ALLOWED: dict[str, set[str]] = {
    part: {part, *(lower for layer in LAYERS[depth + 1 :] for lower in layer)}
    for depth, parts in enumerate(LAYERS)
    for part in parts
} | {"__init__": set()}

# Module of others -> the only places under cmpt/ that may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "deepspeed": ("engine/",),
    "nvidia.dali": ("data/dali.py",),
    "xformers": ("ops/attention.py",),
    "open_clip": (),
}
# Place under cmpt/ -> modules that it must do without.
FORBIDDEN_IN: dict[str, tuple[str, ...]] = {"recipe/": ("torch", "deepspeed", "triton")}


def part_of(path: PurePosixPath) -> str:
    """`engine` for engine/checkpoint.py, `batch` for batch.py; `path` is relative to cmpt/."""
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported_modules(tree: ast.AST, path: PurePosixPath) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, in functions and under TYPE_CHECKING too."""
    package = ["cmpt", *path.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(path: PurePosixPath, source: str) -> list[str]:
    """One line per broken rule of the file at `path` (relative to cmpt/): file, line, rule."""
    part = part_of(path)
    if part not in ALLOWED:
        return [f"cmpt/{path}:1: `{part}` has no place in LAYERS of tests/test_imports.py: give it one"]
    found = []
    for line, module in imported_modules(ast.parse(source), path):
        where = f"cmpt/{path}:{line}: imports {module}"
        if lies_in(module, "cmpt") and module.count("."):
            target = module.split(".")[1]
            if target in ALLOWED and target not in ALLOWED[part] and target != "__init__":
                allowed = ", ".join(sorted(ALLOWED[part])) or "nothing of cmpt"
                found.append(f"{where}, but {part} may import only {allowed}")
        for library, places in ONLY_IN.items():
            if lies_in(module, library) and not any(str(path).startswith(place) for place in places):
                found.append(f"{where}, but only {' and '.join(places) or 'nobody'} may import {library}")
        for place, libraries in FORBIDDEN_IN.items():
            if str(path).startswith(place):
                found += [f"{where}, but {place} does without {name}" for name in libraries if lies_in(module, name)]
    return found


def test_import_directions_hold() -> None:
    package = REPOSITORY / "cmpt"
    broken = [
        fault
        for file in sorted(package.rglob("*.py"))
        for fault in violations(PurePosixPath(file.relative_to(package)), file.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_recipe_loads_without_torch() -> None:
    code = "import sys, cmpt.recipe; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("data/loader.py", "from cmpt.models.clip import Clip", "cmpt/data/loader.py:1: imports cmpt.models.clip.Clip"),
        ("data/loader.py", "from cmpt import masking", "data may import only"),
        ("data/loader.py", "from ..losses import infonce", "imports cmpt.losses.infonce, but data"),
        ("models/clip.py", "def f():\n    import cmpt.engine.step", "cmpt/models/clip.py:2: imports cmpt.engine.step"),
        ("monitor/report.py", "from cmpt.evals import retrieval", "monitor may import only"),
        ("ops/attention.py", "from cmpt.dist import gather", "ops may import only batch, ops, recipe"),
        ("batch.py", "from cmpt.ops.random import Purpose", "batch may import only batch"),
        ("batch.py", "import cmpt.recipe.schema", "batch may import only batch"),
        ("__init__.py", "from cmpt.batch import PackedText", "__init__ may import only nothing of cmpt"),
        ("engine/step.py", "import importlib\nimportlib.import_module('cmpt.train')", "cmpt/engine/step.py:2"),
        ("utils.py", "", "`utils` has no place"),
        ("train.py", "import deepspeed", "only engine/ may import deepspeed"),
        ("losses/infonce.py", "from deepspeed import comm", "only engine/ may import deepspeed"),
        ("data/decode.py", "from nvidia import dali", "only data/dali.py may import nvidia.dali"),
        ("models/vision.py", "import xformers.ops", "only ops/attention.py may import xformers"),
        ("data/tokenizer.py", "import open_clip", "only nobody may import open_clip"),
        ("recipe/schema.py", "from torch import Tensor", "recipe/ does without torch"),
    ],
)
def test_checker_finds(path: str, source: str, fault: str) -> None:
    found = violations(PurePosixPath(path), source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train.py", "from cmpt.engine import step\nfrom cmpt.data.loader import Loader\nimport cmpt"),
        ("engine/checkpoint.py", "import deepspeed\nfrom cmpt.models import clip\nfrom . import schedule"),
        ("data/dali.py", "import nvidia.dali.fn as fn\nfrom cmpt.batch import ImageTextBatch"),
        ("data/tokenizer.py", "from importlib.util import find_spec\nfolder = find_spec('open_clip')"),
        ("ops/attention.py", "import xformers.ops\nimport xformersish, torch"),
        ("recipe/load.py", "from cmpt.recipe.schema import Recipe\nfrom .check import check_recipe"),
        ("evals/suite.py", "from cmpt import __version__, ops"),
    ],
)
def test_checker_lets_pass(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []
