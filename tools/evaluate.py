"""Evaluate a model on held-out pairs: retrieval in both directions, and zero-shot classification by category.

    python tools/evaluate.py MODEL [key=value ...] [--out results.json]

MODEL is a run (runs/NAME: its newest sound checkpoint), one of its checkpoints, a folder that tools/export.py wrote, a
local copy of an open_clip repository of the native ViT kind, or a bare .safetensors or .pt file of that kind. A bare
file says neither its activation nor its heads, epsilon and pooling: what is assumed is printed, and model.* says
otherwise (OpenAI's weights need model.quick_gelu=true).

The pairs are data.heldout of the model's recipe; for a model without one, and to change them, say for example
    data.heldout='["/data/coco/{00000..00004}.tar"]' data.caption_extension=txt
Without any, the embedded clip art is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cmpt.data.heldout import HeldoutSet
from cmpt.data.tokenizer import open_tokenizer
from cmpt.data.validate import DataError
from cmpt.engine.manifest import CheckpointError
from cmpt.engine.opened import open_model
from cmpt.evals.suite import HeldoutSuite
from cmpt.models.open_clip_format import FormatError
from cmpt.recipe import RecipeError
from cmpt.recipe.schema import Data, Recipe

EMBEDDED = Data(
    heldout=["pkg:data/clipart/heldout-0000.tar"],
    caption_extension="json",
    caption_field="captions",
    category_field="category",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the model's recipe")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optimizer.ema_decay)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results there, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        opened = open_model(options.model, options.overrides, options.ema)
        recipe = opened.recipe
        data = recipe.data if recipe.data.heldout else EMBEDDED
        results = evaluate(opened.clip, recipe, data, torch.device(options.device))
        if options.out:
            told = {"model": str(opened.checkpoint or options.model), "heldout": data.heldout, "results": results}
            options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except (CheckpointError, DataError, FormatError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in opened.notes:
        print(note)
    print(f"{opened.checkpoint or options.model} on {', '.join(data.heldout)}\n")
    for name, value in results.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    return 0


def evaluate(clip: torch.nn.Module, recipe: Recipe, data: Data, device: torch.device) -> dict[str, float]:
    """Results by name, as a run records them; fp32."""
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    suite = HeldoutSuite(HeldoutSet(data.heldout, data, recipe.image), tokenizer, recipe, 0, 1, device)
    results, _ = suite.evaluate(clip.to(device))  # type: ignore[arg-type]
    return results


if __name__ == "__main__":
    sys.exit(main())
