"""Evaluate a model: on held-out pairs, or on the tasks of a suite.

    python tools/evaluate.py MODEL [key=value ...] [--out results.json]
    python tools/evaluate.py MODEL --suite recipes/eval/paper.yaml --data DIR [--tasks NAME ...] [--out results.json]
    torchrun --nproc-per-node N tools/evaluate.py MODEL --suite ...          (N processes, the same results)

MODEL is a run (runs/NAME: its newest sound checkpoint), one of its checkpoints, a folder that tools/export.py wrote, a
local copy of an open_clip repository of the native ViT kind, or a bare .safetensors or .pt file of that kind. A bare
file says neither its activation nor its heads, epsilon and pooling: what is assumed is printed, and model.* says
otherwise (OpenAI's weights need model.quick_gelu=true).

Without --suite: retrieval in both directions, and zero-shot classification by category, on data.heldout of the model's
recipe. For a model without one, and to change them, say for example
    data.heldout='["/data/coco/{00000..00004}.tar"]' data.caption_extension=txt
Without any, the embedded clip art is taken.

With --suite: the tasks of that file whose sets lie below DIR; the others are named. So are tasks that fail, and then
the status is 2. Beside the JSON a picture is drawn, results.png, with the published figures that the suite file knows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cmpt.data.heldout import HeldoutSet
from cmpt.data.shards import Ranks
from cmpt.data.tokenizer import open_tokenizer
from cmpt.data.validate import DataError
from cmpt.dist import process_group
from cmpt.dist.process_group import gather_objects
from cmpt.engine.manifest import CheckpointError
from cmpt.engine.opened import OpenedModel, open_model
from cmpt.engine.run_folder import environment
from cmpt.evals.embed import Encoder
from cmpt.evals.heldout import evaluate_heldout
from cmpt.evals.tasks import open_tasks, run_task
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import FormatError
from cmpt.recipe import RecipeError
from cmpt.recipe.schema import Data, Recipe
from cmpt.recipe.suite import Suite, load_suite
from cmpt.recipe.typed import plain
from suite_results import draw_results, print_results

EMBEDDED = Data(
    heldout=["pkg:data/clipart/heldout-0000.tar"],
    caption_extension="json",
    caption_field="captions",
    category_field="category",
)
_LET_THE_FIRST_RANK_SPEAK_S = 2.0
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    rank, world_size, device = 0, 1, torch.device(options.device)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched:
        rank, world_size, device = process_group.start()
    try:
        suite = load_suite(options.suite) if options.suite else None
        opened = open_model(options.model, options.overrides, options.ema)
        opened.clip.compute_dtype = PRECISIONS[options.precision]
        if suite is None:
            told: dict[str, Any] = on_heldout(encoder_of(opened, rank, world_size, device), opened.recipe)
        else:
            told = on_suite(encoder_of(opened, rank, world_size, device), suite, options)
    except (CheckpointError, DataError, FormatError, RecipeError, OSError) as error:
        if rank:  # the first rank speaks first where all have the same to say; the launcher then ends the others
            time.sleep(_LET_THE_FIRST_RANK_SPEAK_S)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if launched:
            process_group.stop()
    if rank == 0:
        report(opened, suite, told, options, world_size)
    return 2 if told.get("failed") else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the model's recipe")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optimizer.ema_decay)")
    parser.add_argument("--suite", metavar="FILE", help="evaluate the tasks of this suite file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the sets of the suite lie")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="only these tasks of the suite")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the towers (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a single process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results there, as JSON")
    options = parser.parse_intermixed_args(arguments)
    if (options.suite is None) != (options.data is None) or (options.tasks and not options.suite):
        parser.error("--suite and --data go together, and --tasks with them")
    if options.out and (options.out.suffix == ".png" or not options.out.parent.is_dir()):
        parser.error(f"--out {options.out}: expected a JSON file in a folder that is there")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no CUDA device")
    return options


def encoder_of(opened: OpenedModel, rank: int, world_size: int, device: torch.device) -> Encoder:
    recipe = opened.recipe
    patch_size, batch_size = recipe.model.patch_size, recipe.evaluation.batch_size
    assert patch_size
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    clip = opened.clip.to(device)
    return Encoder(clip, tokenizer, recipe.image, patch_size, batch_size, rank, world_size, device)


def on_heldout(encoder: Encoder, recipe: Recipe) -> dict[str, Any]:
    """Results on the held-out pairs by name, as a run records them."""
    data = recipe.data if recipe.data.heldout else EMBEDDED
    heldout = HeldoutSet(data.heldout, data, recipe.image, Ranks(encoder.rank, encoder.world_size, gather_objects))
    results, _ = evaluate_heldout(heldout, encoder, recipe.evaluation.prompts)
    return {"heldout": data.heldout, "results": results}


def on_suite(encoder: Encoder, suite: Suite, options: argparse.Namespace) -> dict[str, Any]:
    """Results by task, those that failed and those that were left out with the reason; says on stderr how far it is."""
    tasks, left_out = open_tasks(suite, options.data.expanduser(), options.tasks)
    results, failed = {}, {}
    for number, opened in enumerate(tasks, 1):
        began, name = time.perf_counter(), opened.task.name
        try:
            found = run_task(opened, encoder)
        except DataError as error:  # the others' results are not lost for it
            failed[name] = str(error)
            said = f"error: {name}: {error}"
        else:
            results[name] = {**found, "seconds": time.perf_counter() - began}
            said = f"{name} took {results[name]['seconds']:.1f} s"
        if encoder.rank == 0:
            print(f"{number} of {len(tasks)}: {said}", file=sys.stderr, flush=True)
    return {"results": results, "failed": failed, "left_out": left_out}


def report(
    opened: OpenedModel, suite: Suite | None, told: dict[str, Any], options: argparse.Namespace, world_size: int
) -> None:
    """As JSON, with everything that is needed to have it again, on the console, and as a picture beside the JSON."""
    name, recipe = str(opened.checkpoint or options.model), opened.recipe
    if options.out:
        made = {
            "model": name,
            "weights_sha256": weights_sha256(opened.clip),
            "notes": opened.notes,
            "recipe": plain({key: getattr(recipe, key) for key in ("model", "image", "tokenizer", "evaluation")}),
            "overrides": options.overrides,
            "ema": options.ema,
            "precision": options.precision,
            "device": options.device,
            "suite_file": options.suite,
            "suite": plain(suite),
            "data": str(options.data.resolve()) if options.data else None,
            **told,
            "environment": environment(world_size),
        }
        options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for note in opened.notes:
        print(note)
    if suite is None:
        print(f"{name} on {', '.join(told['heldout'])}\n")
        for key, value in told["results"].items():
            print(f"{key:28} {value:.4f}" if isinstance(value, float) else f"{key:28} {value}")
        return
    print_results(name, suite, told["results"], {**told["left_out"], **told["failed"]})
    if options.out:
        picture = options.out.with_suffix(".png")
        draw_results(picture, name, suite, told["results"])
        print(f"written: {options.out} and {picture}")


def weights_sha256(clip: CLIP) -> str:
    """Of all parameters by name, as fp32 bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
