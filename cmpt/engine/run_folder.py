"""The folder of one run: is it new, is it the same run, and what machine and versions it runs with."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cmpt.recipe import RecipeError, differences, load_recipe, to_yaml
from cmpt.recipe.schema import Recipe

_PACKAGES = ("torch", "deepspeed", "xformers", "nvidia-dali-cuda130", "webdataset", "omegaconf", "sentencepiece")

LEFT_OUT = "left_out.json"


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.run.folder).expanduser() / recipe.run.name


def conflict(recipe: Recipe) -> str | None:
    """One line saying why this recipe cannot go on in its run folder, or None. Changes nothing.

    Settings that do not change the mathematics (logging, workers, evaluation …) may differ from the first start.
    """
    folder = run_folder(recipe)
    before = folder / "recipe.yaml"
    if not folder.exists():
        return None
    if not before.exists():  # neither resumed nor, with run.overwrite, deleted
        if not folder.is_dir() or any(folder.iterdir()):
            return f"run.name: {folder} exists and is not a run folder (no recipe.yaml); choose another run.name"
        return None
    if recipe.run.overwrite or not _has_begun(folder):
        return None  # what a start left that never came to a checkpoint holds nothing to go on with
    remedy = "choose another run.name, or start over with run.overwrite=true"
    try:
        started = load_recipe(str(before)).recipe
        # The first start filled in what the tokenizer decides.
        vocab_size = recipe.model.vocab_size or started.model.vocab_size
        changed = differences(started, replace(recipe, model=replace(recipe.model, vocab_size=vocab_size)))
    except RecipeError as error:
        return f"run.name: {before} cannot be read ({error.faults[0]}); {remedy}"
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"run.name: {folder} holds a run with another recipe ({'; '.join(changed[:3])}{more}); {remedy}"
    return None


def _has_begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any((folder / "checkpoints").glob("step_*"))


def left_out(recipe: Recipe) -> list[str]:
    """URLs of the shards that could not be had when the run in the folder began: they stay out of its order."""
    folder = run_folder(recipe)
    if recipe.run.overwrite or not _has_begun(folder) or not (folder / LEFT_OUT).exists():
        return []
    return list(json.loads((folder / LEFT_OUT).read_text()))


def prepare(recipe: Recipe, world_size: int, out_of_reach: Sequence[str] = ()) -> Path:
    """Make the folder, or empty it if the recipe says so, and write recipe.yaml and environment.json. Rank 0 only.

    `out_of_reach`: URLs of shards that the order of this run is made without, for `left_out`.

    Call it only where `conflict` found none: it deletes what stands in the folder if run.overwrite is set. Raises
    RecipeError where another process trains in it; the folder is this one's until the process ends.
    """
    folder = run_folder(recipe)
    if recipe.run.overwrite and folder.exists():
        _own(folder)
        shutil.rmtree(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    _own(folder)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    if not _has_begun(folder):
        (folder / LEFT_OUT).write_text(json.dumps(list(out_of_reach), indent=1) + "\n")
    (folder / "environment.json").write_text(json.dumps(environment(world_size), indent=1) + "\n")
    return folder


def _own(folder: Path) -> None:
    """Lock the folder for as long as this process lives, where its file system can; two runs in it would ruin it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RecipeError([f"run.name: another process is training in {folder}; end it first"]) from error
    except OSError:
        os.close(descriptor)  # a file system without locks


def environment(world_size: int) -> dict[str, Any]:
    """Git revision, versions and hardware of this start."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "revision": _revision(),
        "python": platform.python_version(),
        "versions": versions,
        "host": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpus": devices},
        "world_size": world_size,
        "threads_per_process": torch.get_num_threads(),
    }


def _revision() -> str | None:
    """The commit of the source tree, with "+changes" if it was not clean; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()[:12] + ("+changes" if status.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
