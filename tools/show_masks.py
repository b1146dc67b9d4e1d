"""Show what masking does to your own pictures: one PNG for each, with every strategy side by side.

    python tools/show_masks.py IMAGE... [key=value ...] [--recipe RECIPE | --run RUN] [--out FOLDER]

    python tools/show_masks.py holiday.jpg diagram.png masking.ratio=0.6 --out masks
    python tools/show_masks.py data/cc12m/00000.tar --count 8 --seed 1 --run runs/vitb16_cc12m

IMAGE is a picture that training can read (JPEG, PNG, WebP …), or a shard (.tar), of which the first --count images are
taken, or with --seed others. Each is seen as the evaluation sees it: its whole middle, at the recipe's image size.

A page shows how cluster masking comes about (patches, anchors, similarity, clusters, what is kept), the similarity to
each anchor, and what each strategy keeps. One threshold decides what is in a cluster. Training holds it where the mean
over its batches is masking.ratio, so it is fitted to all images of one call together; give as many as you can, or take
the threshold of a run (--run). The console tells how much of each image is white background, and how much of what is
hidden is: of plain clip art and diagrams, cluster masking hides mostly paper.

The same command gives the same bytes. Nothing is written before all images are read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmpt.data.decode import decode_upright, heldout_pixels
from cmpt.data.reader import ShardReader
from cmpt.data.samples import read_image
from cmpt.data.shards import open_shards
from cmpt.data.validate import DataError, UnusableError, examine_image
from cmpt.engine.manifest import STATE, CheckpointError, newest_sound
from cmpt.masking.strategies import Embed, masking_at
from cmpt.ops.random import Purpose, permutation
from cmpt.recipe import LoadedRecipe, RecipeError, check_recipe, load_recipe
from cmpt.recipe.phases import apply_phase
from cmpt.recipe.schema import Data, Image, Masking, Recipe
from mask_page import Caption, page
from mask_views import Settings, View, look

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = "recipes/vitb16_cc12m.yaml"
NEEDED_FIELDS = ("masking.", "image.", "model.patch_size", "data.image_extensions", "data.max_image_pixels", "phases.",
                 "run.seed")  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An image that was read."""

    name: str  # for people: the file, or shard/key
    data: bytes

    @property
    def stem(self) -> str:
        """Begins the name of what is written."""
        path = PurePosixPath(self.name)
        return path.name if path.parent.suffix == ".tar" else path.stem

    @property
    def title(self) -> str:
        """The name without folders."""
        path = PurePosixPath(self.name)
        return f"{path.parent.name}/{path.name}" if path.parent.suffix == ".tar" else path.name


@dataclass(frozen=True)
class Shown:
    """What to show the images with, and in words where it comes from."""

    recipe: Recipe
    settings: Settings
    source: str  # the recipe and its overrides
    threshold_source: str | None  # None: fitted to the images


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="pictures and shards, and key=value for the recipe")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--recipe", metavar="RECIPE", help=f"a YAML file (default: {RECIPE})")
    origin.add_argument("--run", type=Path, metavar="RUN",
                        help="a run's folder: its recipe, and the threshold of its newest checkpoint")  # fmt: skip
    parser.add_argument("--threshold", type=float, metavar="T", help="a similarity -1 … 1, instead of a fitted one")
    parser.add_argument("--phase", metavar="NAME", help="of the recipe (default: the first, or that of the checkpoint)")
    parser.add_argument("--progress", type=float, metavar="P",
                        help="point of the phase for settings that move: 0 its first step, 1 its last "
                        "(default: 0, or that of the checkpoint)")  # fmt: skip
    parser.add_argument("--ordinal", type=int, default=0, metavar="N",
                        help="number of the sample in a run; another one has other draws "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--count", type=int, default=4, metavar="N", help="images of a shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, metavar="S", help="take images from all over a shard, others for each S")
    parser.add_argument("--out", type=Path, default=Path("masks"), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    for name, low, high in (("threshold", -1, 1), ("progress", 0, 1), ("ordinal", 0, 1 << 62), ("count", 1, 1 << 62)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} must be {f'in {low} … {high}' if high <= 1 else f'at least {low}'}, got {value}")
    if options.run and options.threshold is not None:
        parser.error("--threshold and --run both say the threshold; give --recipe RUN/recipe.yaml instead of --run")
    try:
        show(options)
    except (CheckpointError, DataError, RecipeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(options: argparse.Namespace) -> None:
    """Reads everything, then writes a PNG per image. Raises RecipeError, CheckpointError, DataError, OSError, and
    ValueError where a strategy cannot work."""
    overrides = [given for given in options.inputs if "=" in given and not os.path.exists(given)]
    inputs = [given for given in options.inputs if given not in overrides]
    if not inputs:
        raise DataError("IMAGE: give at least one picture or shard")
    shown = read_settings(options, overrides)
    settings, data = shown.settings, shown.recipe.data
    pictures = [picture for given in inputs for picture in read_input(given, data, options.count, options.seed)]
    sizes = [original_size(picture, data) for picture in pictures]
    images_BCHW = np.stack([view_of(picture, data, settings.image.size) for picture in pictures])
    smaller = [view_of(picture, data, settings.smaller_size) for picture in pictures]
    threshold, views = look(torch.from_numpy(images_BCHW), settings)

    told = threshold_told(shown, threshold, views)
    print(told)
    options.out.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for picture, (height, width), view, smaller_CHW in zip(pictures, sizes, views, smaller, strict=True):
        about = (
            f"{width} × {height} pixels, its middle at {settings.image.size} px · patches of {settings.patch_size} px"
            f" · {shown.source} · ordinal {settings.ordinal}"
        )
        png = page(view, smaller_CHW.transpose(1, 2, 0), settings, threshold, Caption(picture.title, about, told))
        file = options.out / f"{unused(picture.stem, used)}-masks.png"
        file.write_bytes(png)
        print(f"{picture.name}: {background_told(view)} -> {file}")


def read_settings(options: argparse.Namespace, overrides: Sequence[str]) -> Shown:
    """The settings of a recipe, or of a run at its newest checkpoint."""
    checkpoint: Path | None = None
    state: dict[str, Any] = {}
    if options.run:
        checkpoint = newest_checkpoint(options.run)
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        path = options.run / "recipe.yaml"
    else:
        path = options.recipe or REPOSITORY / RECIPE
    loaded = load_recipe(str(path), overrides)
    recipe = loaded.recipe
    check_needed(loaded)
    phase = options.phase or (phase_at(options.run, state["step"]) if options.run and recipe.phases else None)
    masking, image = phase_settings(recipe, phase)
    progress = options.progress if options.progress is not None else float(state.get("masking", {}).get("progress", 0))
    masking = masking_at(masking, progress)
    source = " ".join([str(options.run or options.recipe or RECIPE), *overrides])
    if recipe.phases:
        source += f" · phase {phase or recipe.phases[0].name or 1}"
    threshold_source = None
    if masking.threshold is not None:
        threshold_source = "masking.threshold of the recipe"
    if options.threshold is not None:
        masking.threshold, threshold_source = options.threshold, "given with --threshold"
    if checkpoint is not None:
        masking.threshold = state["masking"].get("threshold")
        if masking.threshold is None:
            raise CheckpointError(f"{checkpoint}: has no threshold, masking.strategy is {masking.strategy}; "
                                  f"give --recipe {path} instead of --run")  # fmt: skip
        threshold_source = f"of {options.run.name}/checkpoints/{checkpoint.name}"
    embed = embedder(checkpoint, masking, overrides) if masking.embedding_share else None
    assert recipe.model.patch_size is not None  # checked above
    settings = Settings(masking, image, recipe.model.patch_size, recipe.run.seed, options.ordinal, embed)
    return Shown(recipe, settings, source, threshold_source)


def check_needed(loaded: LoadedRecipe) -> None:
    """Raises RecipeError for faults of what masks depend on; the training data need not be there."""
    faults = check_recipe(loaded.recipe, 1, loaded.origins)
    needed = [fault for fault in faults if fault.startswith(NEEDED_FIELDS)]
    if needed:
        raise RecipeError(needed)


def newest_checkpoint(run: Path) -> Path:
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder")
    checkpoint, passed_over = newest_sound(run / "checkpoints")
    if checkpoint is None:
        faults = "; ".join(str(fault) for _, fault in passed_over)
        raise CheckpointError(f"{run}: holds no sound checkpoint" + (f": {faults}" if faults else ""))
    return checkpoint


def phase_at(run: Path, step: int) -> str | None:
    """The phase that the run's newest record up to a step belongs to; None without a record."""
    found = None
    records = run / "metrics.jsonl"
    for line in records.read_text(encoding="utf-8").splitlines() if records.is_file() else []:
        row = json.loads(line)
        if row["step"] <= step:
            found = row["phase"]
    return found


def phase_settings(recipe: Recipe, name: str | None) -> tuple[Masking, Image]:
    """Of the phase of that name, or of the first one; a recipe without phases is one."""
    names = [phase.name or f"phase {number}" for number, phase in enumerate(recipe.phases, start=1)]
    if name is not None and name not in names:
        has = f"has {', '.join(names)}" if names else "has no phases"
        raise DataError(f"--phase: no phase {name!r}; the recipe {has}")
    if not names:
        return recipe.masking, recipe.image
    index = names.index(name) if name is not None else 0
    faults: list[str] = []
    sections = apply_phase(
        recipe, recipe.phases[index], f"phases.{index}.set", lambda *fault: faults.append(str(fault))
    )
    assert not faults  # the recipe was checked
    return sections["masking"], sections["image"]


def embedder(checkpoint: Path | None, masking: Masking, overrides: Sequence[str]) -> Embed:
    """The patch embeddings of a checkpoint's weights; overrides must not be about what belongs to these."""
    if checkpoint is None:
        raise DataError(f"masking.embedding_share = {masking.embedding_share:g}: compares a model's embeddings; "
                        "give --run, or set it to 0")  # fmt: skip
    from cmpt.engine.opened import open_checkpoint  # with DeepSpeed, which takes seconds

    visual = open_checkpoint(checkpoint, overrides).clip.visual

    @torch.no_grad()
    def embed(patches_BLP: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return visual.patch_embeddings(patches_BLP, grid, torch.float32, masking.embedding_positions)

    return embed


def read_input(given: str, data: Data, count: int, seed: int | None) -> list[Picture]:
    """One picture, or `count` of a shard."""
    path = Path(given)
    if not path.exists():
        raise DataError(f"{given}: no such file")
    if path.is_dir():
        raise DataError(f"{given}: is a folder; give the pictures in it")
    return read_shard(path, data, count, seed) if path.suffix == ".tar" else [Picture(given, path.read_bytes())]


def read_shard(path: Path, data: Data, count: int, seed: int | None) -> list[Picture]:
    """Its first images that can be used, or with a seed the first in a random order; the others are told."""
    (shard,) = open_shards([str(path)], data, str(path))
    reader = ShardReader(1, data)
    places = range(shard.count) if seed is None else permutation(seed, 0, Purpose.MEMBER_ORDER, shard.count).tolist()
    pictures: list[Picture] = []
    faults: list[str] = []
    for place in places:
        members = reader.members(shard, place)
        try:
            picture = Picture(f"{path}/{members.key.replace('/', '_')}", read_image(reader, shard, members, data))
            view_of(picture, data, 1)
        except UnusableError as error:
            faults.append(f"{path}/{members.key}: left out, {error}")
            continue
        pictures.append(picture)
        if len(pictures) == count:
            break
    if not pictures:
        raise DataError(f"{path}: holds no image that can be used; first {faults[0]}")
    for fault in faults:
        print(fault)
    return pictures


def view_of(picture: Picture, data: Data, size: int) -> NDArray[np.uint8]:
    """Its middle as the evaluation sees it: uint8 [C, size, size]. Raises UnusableError."""
    return heldout_pixels(picture.data, examine_image(picture.data, data.max_image_pixels), size)


def original_size(picture: Picture, data: Data) -> tuple[int, int]:
    """Height and width, upright. Raises DataError, naming the file, where training could not read it."""
    try:
        header = examine_image(picture.data, data.max_image_pixels)
        height, width, _ = decode_upright(picture.data, header).shape
    except UnusableError as error:
        raise DataError(f"{picture.name}: cannot be used as an image: {error}") from error
    return height, width


def threshold_told(shown: Shown, threshold: float, views: Sequence[View]) -> str:
    """The threshold, where it comes from, and the mean ratio that it gives."""
    reached = 100 * float(np.mean([1 - view.keep["cluster"].mean() for view in views]))
    target = f"masking.ratio = {shown.settings.stage('cluster').masking.ratio:g}"
    those = "this image" if len(views) == 1 else f"these {len(views)} images"
    told = shown.threshold_source
    if told is None:
        told = f"fitted to {those}{' alone' if len(views) == 1 else ''}, {target}"
    told = f"Threshold {threshold:.3f}: {told}; hides {reached:.1f} % of {those}"
    if shown.threshold_source is None and len(views) == 1:
        told += " (training has one for all images: give more, or --run)"
    return told


def background_told(view: View) -> str:
    shares = [f"{100 * view.background:.1f} % white background"]
    for strategy in ("cluster", "random"):
        share = view.hidden_background(strategy)
        shares.append(f"{strategy} {100 * share:.1f} %" if share is not None else f"{strategy} hides nothing")
    return f"{shares[0]}; of the hidden patches: {', '.join(shares[1:])}"


def unused(stem: str, used: set[str]) -> str:
    """The stem, or with a number where another picture has it already."""
    name, number = stem, 2
    while name in used:
        name, number = f"{stem}-{number}", number + 1
    used.add(name)
    return name


if __name__ == "__main__":
    sys.exit(main())
