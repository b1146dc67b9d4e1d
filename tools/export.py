"""Turn a checkpoint into a folder that open_clip loads:

    python tools/export.py CHECKPOINT OUT [--verify] [--half]

CHECKPOINT is a run (runs/NAME: its newest sound checkpoint), one checkpoint (runs/NAME/checkpoints/step_00000300), of
any ZeRO stage and number of processes, or anything else that tools/evaluate.py takes. OUT then works in open_clip as

    open_clip.create_model_and_transforms("local-dir:OUT"), open_clip.get_tokenizer("local-dir:OUT")

--verify runs real images and captions through open_clip and through cmpt and compares token ids, features, logits and
ranking; it exits with 1 if any of them differs by more than rounding. --verify-only does so with an OUT that is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from cmpt.data.hf_tokenizer import write_hf_tokenizer
from cmpt.data.tokenizer import CLIP_MERGES_SHA256, ClipTokenizer, Tokenizer, open_tokenizer
from cmpt.data.validate import DataError
from cmpt.engine.manifest import CheckpointError
from cmpt.engine.opened import OpenedModel, open_model
from cmpt.models.open_clip_format import FormatError, check_finite, halved, to_config
from cmpt.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from cmpt.recipe import RecipeError, to_yaml
from cmpt.recipe.paths import resolve_path
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Model, Recipe
from verify_export import verify_export
from with_open_clip import import_open_clip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint, or an exported folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make; must not exist or be empty")
    parser.add_argument("--half", action="store_true", help="store the weights in fp16: half the size")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (optimizer.ema_decay)")
    parser.add_argument("--verify", action="store_true", help="confirm the result with open_clip itself")
    parser.add_argument("--verify-only", action="store_true", help="write nothing: confirm an OUT that is there")
    parser.add_argument("--images", type=at_least_1, default=32, help="images that --verify compares (%(default)s)")
    parser.add_argument(
        "--captions", type=at_least_1, default=1000, help="captions whose ids it compares (%(default)s)"
    )
    options = parser.parse_args(arguments)
    out = options.out.expanduser().absolute()
    try:
        if options.verify or options.verify_only:
            import_open_clip()  # before anything is written
        opened = open_model(options.checkpoint, average=options.ema)
        for note in opened.notes:
            print(note)
        if not options.verify_only:
            export(opened, out, options.half)
        elif not (out / CONFIG_FILE).is_file():
            raise FormatError(f"OUT = {out}: is not an exported folder, it has no {CONFIG_FILE}")
        if options.verify or options.verify_only:
            return 0 if verify_export(opened, out, options.images, options.captions) else 1
    except (
        CheckpointError,
        DataError,
        FormatError,
        RecipeError,
        OSError,
        SafetensorError,
        ModuleNotFoundError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def export(opened: OpenedModel, out: Path, half: bool) -> None:
    """Write the folder, whole or not at all. Raises FileExistsError; FormatError for what open_clip cannot express."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT = {out}: exists already and is not an empty folder")
    recipe, model = opened.recipe, opened.recipe.model
    tokenizer = open_tokenizer(recipe.tokenizer, model.context_length)
    check_expressible(recipe, tokenizer)
    weights = opened.weights()
    check_finite(weights, "not a number or infinite in")
    beside = out.with_name(f".writing_{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        tokenizer_config: dict[str, Any] = {}
        if recipe.tokenizer.kind == "sentencepiece":
            assert recipe.tokenizer.path
            path = Path(resolve_path(recipe.tokenizer.path))
            tokenizer_config = write_hf_tokenizer(path, beside, model.context_length)
        config = {
            "model_cfg": to_config(model, recipe.image.size, tokenizer.eot_id, tokenizer_config),
            "preprocess_cfg": {
                "mean": list(recipe.image.mean),
                "std": list(recipe.image.std),
                "interpolation": "bicubic",
                "resize_mode": "shortest",
            },
        }
        (beside / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(halved(weights) if half else weights, beside / WEIGHTS_FILE, metadata={"format": "pt"})
        (beside / WEIGHTS_FILE).chmod(0o644)  # safetensors lets only the owner read
        (beside / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        (beside / "README.md").write_text(model_card(opened, half), encoding="utf-8")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 2**20:.1f} MiB, loads in open_clip as local-dir:{out}")


def check_expressible(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises FormatError, naming field, value and constraint, for what open_clip 3.3.0 has no place for."""
    model = recipe.model
    if isinstance(tokenizer, ClipTokenizer) and tokenizer.merges_sha256 != CLIP_MERGES_SHA256:
        raise FormatError(
            f"tokenizer.path = {recipe.tokenizer.path}: must hold CLIP's own merges, which open_clip uses"
        )
    if model.text.pooling == "argmax" and tokenizer.eot_id != tokenizer.vocab_size - 1:
        raise FormatError(
            "model.text.pooling = argmax: must be eos with this tokenizer, whose end of text has id "
            f"{tokenizer.eot_id} of {tokenizer.vocab_size}: open_clip would take another token, or padding, for it"
        )


def preset_of(model: Model) -> str | None:
    """The preset's name, if the model is exactly of that size."""
    sizes = PRESETS.get(model.preset or "", {})
    return model.preset if all(attrgetter(key)(model) == size for key, size in sizes.items()) else None


def model_card(opened: OpenedModel, half: bool) -> str:
    """What the model is, how it was trained, what it reached: for README.md of the folder."""
    recipe, model = opened.recipe, opened.recipe.model
    run = opened.checkpoint.resolve().parent.parent if opened.checkpoint else None
    step = opened.state.get("step")
    parameters = sum(parameter.numel() for parameter in opened.clip.parameters())
    masking = recipe.masking
    facts: list[tuple[str, Any]] = [
        ("architecture", preset_of(model) or "see open_clip_config.json"),
        ("parameters", f"{parameters:,}"),
        ("image size, patch", f"{recipe.image.size} px, {model.patch_size} px"),
        ("tokenizer", f"{recipe.tokenizer.kind}, {model.vocab_size:,} ids, at most {model.context_length} tokens"),
        ("stored precision", "fp16" if half else "fp32"),
    ]
    if step is not None:
        phases = [f"{phase.name}: {phase.duration}, {json.dumps(phase.set)}" for phase in recipe.phases]
        facts += [
            ("training", f"step {step:,}, {step * recipe.engine.batch_size:,} samples seen, "
             f"global batch {recipe.engine.batch_size:,}, {recipe.engine.precision}"),
            ("loss", f"{recipe.loss.kind}, final temperature {1 / opened.clip.scale().item():.5f}"),
            ("masking", f"{masking.strategy}" + (f", ratio {masking.ratio}" if masking.strategy != "none" else "")),
            *([("phases", "; ".join(phases))] if phases else []),
            ("samples that could not be used", f"{sum(opened.state.get('skipped', {}).values()):,}"),
        ]  # fmt: skip
    lines = ["---", "library_name: open_clip", "tags: [clip, zero-shot-image-classification]", "---", "",
             f"# {recipe.run.name}", "", "A CLIP model trained with cmpt. In open_clip:", "", "```python",
             'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")',
             'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")', "```", "",
             *(f"- {name}: {value}" for name, value in facts)]  # fmt: skip
    if run is not None:
        lines += held_out_lines(run, step)
    lines += ["", f"Every value of the recipe is in `recipe.yaml`. Exported {time.strftime('%Y-%m-%d')}.", ""]
    return "\n".join(lines)


def held_out_lines(run: Path, step: int | None) -> list[str]:
    """The evaluation of this step during the run, or the last one before it."""
    try:
        rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    rows = [row for row in rows if step is None or row.get("step", 0) <= step]
    if not rows:
        return ["", "Held-out results: none were recorded up to this step."]
    results = {key: value for key, value in rows[-1].items() if isinstance(value, int | float) and key != "seconds"}
    return ["", f"Held-out results at step {results.pop('step'):,}:", "", "| | |", "|-|-|",
            *(f"| {key} | {value:.4g} |" for key, value in results.items())]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
