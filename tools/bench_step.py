"""The training step of cmpt and of open_clip, side by side in one process:

    python tools/bench_step.py --against open_clip [--preset ViT-B-16] [--batch-size 32] [--rounds 5]

Same architecture and initial weights, same images and captions (of the embedded clip art, at the model's image size),
same batch and precision. Every round runs one step of every side, in an order that rotates; the ratio of two sides is
the median over rounds of the ratios within a round. Timed is everything from decoded uint8 images (cmpt) or normalised
float images (open_clip) and token ids on the device to the optimizer's step. Peak memory is measured in a process of
its own for every side. Before timing, the losses of both sides without masking are compared.

Besides masking, two things move the ratios. The embedded captions are short: cmpt packs them, open_clip pads each to 77
tokens, so longer ones gain less; the report says how many tokens they had, and which mask ratio was reached. And cmpt's
AdamW is fused, open_clip's is what open_clip_train uses (torch's default, a loop over tensors on a CPU) unless --fused.
"""

from __future__ import annotations

import os

# oneDNN's default, for both sides: with the 64 of cmpt/train.py, cmpt's many shapes would push out open_clip's few.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"

import argparse
import gc
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmpt.batch import ImageTextBatch
from cmpt.data.streams import LoaderState
from cmpt.data.tokenizer import open_tokenizer, with_vocabulary
from cmpt.dist import process_group
from cmpt.engine.build import build as build_trained
from cmpt.engine.step import find_gradient, take_step
from cmpt.masking.patches import standardise
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops, training_flops
from cmpt.models.open_clip_format import from_open_clip
from cmpt.monitor.meters import peak_resident_bytes
from cmpt.recipe import load_recipe
from cmpt.recipe.schema import Masking, Recipe
from cmpt.train import build_loader
from with_open_clip import import_open_clip

REPOSITORY = Path(__file__).resolve().parents[1]
SIDES = {
    "cmpt cluster": "cmpt, cluster masking 50 %",
    "cmpt none": "cmpt, no masking",
    "open_clip": "open_clip, no masking",
    "open_clip dropout": "open_clip, patch dropout 0.5",
}
# (faster side, slower side, what the project aims at)
RATIOS = (
    ("cmpt cluster", "open_clip", 2.0),
    ("cmpt cluster", "open_clip dropout", 1.2),
    ("cmpt none", "open_clip", 1.08),
)


@dataclass(frozen=True)
class Taken:
    """What one step of one side gave."""

    loss: float
    seconds: float
    flops: float | None = None  # counted for cmpt only, as is the mask ratio
    mask_ratio: float | None = None


Step = Callable[[ImageTextBatch], Taken]
Rounds = dict[str, list[Taken]]  # the timed steps of every side


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["open_clip"], default="open_clip")
    parser.add_argument("--preset", default="ViT-B-16", help="a size that open_clip has too (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--fused", action="store_true", help="a fused AdamW for open_clip too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measured value there")
    parser.add_argument("--peak-of", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # open_clip warns that its weights are random

    if options.peak_of:
        print(json.dumps({"peak_bytes": peak_bytes(options)}))
        return 0
    peaks = {} if options.no_memory else {side: measured_peak(options, side) for side in options.sides}
    _, _, device = process_group.start()
    try:
        report(options, device, *timed(options, device), peaks)
    finally:
        process_group.stop()
    return 0


def recipe_of(options: argparse.Namespace) -> Recipe:
    """ViT at 224 pixels with CLIP's vocabulary, on the embedded pictures."""
    overrides = [
        f"model.preset={options.preset}",
        f"engine.batch_size={options.batch_size}",
        f"engine.precision={options.precision}",
        "data.streams=1",
    ]
    quickstart = load_recipe(str(REPOSITORY / "recipes/quickstart.yaml")).recipe
    recipe = load_recipe(str(REPOSITORY / "recipes/base.yaml"), overrides).recipe
    recipe.data.train, recipe.data.caption_extension = quickstart.data.train, quickstart.data.caption_extension
    recipe.data.caption_field = quickstart.data.caption_field
    return with_vocabulary(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length))


def batches_of(recipe: Recipe, count: int, device: torch.device) -> list[ImageTextBatch]:
    loader = build_loader(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length), 0, 1)
    state: LoaderState = loader.initial_state()
    found = []
    for batch, _ in loader.batches(state):
        found.append(batch.to(device))
        if len(found) == count:
            return found
    raise AssertionError("the loader never ends")


def open_clip_model(options: argparse.Namespace, patch_dropout: float, device: torch.device) -> Any:
    torch.manual_seed(0)
    precision = "amp_bf16" if options.precision == "bf16" else "fp32"
    return import_open_clip().create_model(
        options.preset, load_weights=False, precision=precision, device=device, force_patch_dropout=patch_dropout
    )


def cmpt_step(options: argparse.Namespace, recipe: Recipe, strategy: str, device: torch.device) -> Step:
    """One step as cmpt/train.py takes it, from the decoded batch on; left out is the count of the step over ranks."""
    assert recipe.model.patch_size
    clip = CLIP(recipe.model, recipe.image.size)
    theirs = open_clip_model(options, 0.0, torch.device("cpu"))
    clip.load_state_dict(from_open_clip(theirs.state_dict(), recipe.model, recipe.image.size))
    del theirs
    if options.compile:
        for tower in (clip.visual, clip.text):
            for block in tower.transformer.blocks:
                block.compile(dynamic=True)
    trained = build_trained(clip, recipe.engine, recipe.optimizer, 1, device)
    mask = MaskStage(Masking(strategy=strategy), recipe.image, recipe.model.patch_size, seed=0)

    def step(batch: ImageTextBatch) -> Taken:
        began = now(device)
        masked = mask(batch.images_BCHW, batch.ordinal_B, batch.valid_B)
        lengths = masked.patches.lengths
        mask_ratio = 1 - sum(lengths) / (len(lengths) * masked.keep_BL.shape[1])
        mask.advance(mask_ratio)
        result = find_gradient(trained, masked.patches, batch.text, None, recipe.loss)
        take_step(trained, result, recipe.optimizer.lr, None)
        seconds = now(device) - began
        flops = training_flops(recipe.model, lengths, batch.text.lengths, options.batch_size)
        return Taken(result.loss, seconds, flops, mask_ratio)

    return step


def open_clip_step(options: argparse.Namespace, recipe: Recipe, patch_dropout: float, device: torch.device) -> Step:
    """One step as open_clip_train takes it: autocast, its loss, AdamW with its parameter groups, the clamp."""
    open_clip = import_open_clip()
    model = open_clip_model(options, patch_dropout, device).train()
    loss_of = open_clip.ClipLoss()
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=options.fused or None,
    )
    forward = torch.compile(model) if options.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def step(batch: ImageTextBatch) -> Taken:
        images, ids = open_clip_inputs(recipe, batch)
        began = now(device)  # after what still runs of the inputs: its data loader would have made them
        optimizer.zero_grad()
        with autocast:
            image, text, scale = forward(images, ids)[:3]
            loss = loss_of(image, text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(recipe.model.logit_scale_max))
        seconds = now(device) - began
        return Taken(float(loss.detach()), seconds)

    return step


def open_clip_inputs(recipe: Recipe, batch: ImageTextBatch) -> tuple[Tensor, Tensor]:
    """Normalised images and padded ids, as its data pipeline would deliver them."""
    images_BCHW = batch.images_BCHW.contiguous()
    flat = standardise(images_BCHW.flatten(1), recipe.image.mean, recipe.image.std)
    ids = torch.zeros(len(images_BCHW), recipe.model.context_length, dtype=torch.int64, device=images_BCHW.device)
    text = batch.text
    rows = torch.repeat_interleave(text.order_B, torch.tensor(text.lengths, device=ids.device))
    ids[rows, text.position_U] = text.ids_U
    return flat.view(images_BCHW.shape), ids


def build(options: argparse.Namespace, side: str, recipe: Recipe, device: torch.device) -> Step:
    if side.startswith("cmpt"):
        return cmpt_step(options, recipe, side.split()[1], device)
    return open_clip_step(options, recipe, 0.5 if side.endswith("dropout") else 0.0, device)


def timed(options: argparse.Namespace, device: torch.device) -> tuple[Rounds, float]:
    """The timed rounds, and the mean number of tokens of their captions (with the marks of start and end)."""
    recipe = recipe_of(options)
    warm_up, *batches = batches_of(recipe, options.rounds + 1, device)
    steps = {side: build(options, side, recipe, device) for side in options.sides}
    compare_losses(options, {side: step(warm_up).loss for side, step in steps.items()})
    rounds: Rounds = {side: [] for side in steps}
    order = list(steps)
    for number, batch in enumerate(batches):
        for side in order:
            gc.collect()
            rounds[side].append(steps[side](batch))
        order.append(order.pop(0))
        if sys.stderr.isatty():
            print(f"round {number + 1} of {options.rounds}", end="\r", file=sys.stderr)
    return rounds, statistics.mean(length for batch in batches for length in batch.text.lengths)


def compare_losses(options: argparse.Namespace, losses: dict[str, float]) -> None:
    """Without masking both sides compute the same; if not, there is nothing to time."""
    if {"cmpt none", "open_clip"} <= losses.keys():
        apart = abs(losses["cmpt none"] - losses["open_clip"])
        assert apart < (2e-2 if options.precision == "bf16" else 1e-4), f"the sides compute different losses: {losses}"
        print("first losses: " + ", ".join(f"{side} {loss:.4f}" for side, loss in losses.items()))


def now(device: torch.device) -> float:
    """Seconds, once all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(options: argparse.Namespace) -> int:
    """Peak memory of two steps of one side above what the process held before its model was built."""
    _, _, device = process_group.start()
    recipe = recipe_of(options)
    batches = batches_of(recipe, 2, device)
    import_open_clip()
    before = 0 if device.type == "cuda" else peak_resident_bytes()
    step = build(options, options.peak_of, recipe, device)
    for batch in batches:
        step(batch)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes() - before


def measured_peak(options: argparse.Namespace, side: str) -> int:
    command = [sys.executable, __file__, "--peak-of", side, "--preset", options.preset]
    command += ["--batch-size", str(options.batch_size), "--precision", options.precision]
    command += [option for option in ("--compile", "--fused") if getattr(options, option[2:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {side} could not be measured:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def report(
    options: argparse.Namespace, device: torch.device, rounds: Rounds, caption_tokens: float, peaks: dict[str, int]
) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_flops(name)
    print(f"{options.preset}, batch {options.batch_size}, {options.precision}, {name}, torch {torch.__version__}, "
          f"median of {options.rounds} rounds\n")  # fmt: skip
    print("| | s per step | pairs/s | TFLOP/s | MFU | peak memory |\n|-|-|-|-|-|-|")
    seconds = {side: [step.seconds for step in steps] for side, steps in rounds.items()}
    for side, steps in rounds.items():
        median = statistics.median(seconds[side])
        # Lengths differ from round to round, so FLOPs are divided by the seconds of their own round.
        rate = statistics.mean((step.flops or 0) / step.seconds for step in steps)
        print(f"| {SIDES[side]} | {median:.3f} | {options.batch_size / median:.1f} "
              f"| {f'{rate / 1e12:.2f}' if rate else ''} | {f'{100 * rate / peak:.1f} %' if rate and peak else ''} "
              f"| {f'{peaks[side] / 2**30:.2f} GiB' if side in peaks else ''} |")  # fmt: skip
    print(f"\nmean text tokens per caption: {caption_tokens:.1f}")
    for side, steps in rounds.items():
        if reached := [step.mask_ratio for step in steps if step.mask_ratio is not None]:
            print(f"mean mask ratio reached by {SIDES[side]}: {statistics.mean(reached):.3f}")
    print()
    for fast, slow, goal in RATIOS:
        if fast in seconds and slow in seconds:
            ratios = [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
            print(f"{SIDES[fast]} against {SIDES[slow]}: {statistics.median(ratios):.2f}x "
                  f"({min(ratios):.2f} to {max(ratios):.2f}), aim {goal}x")  # fmt: skip
    if options.json:
        values = {side: [asdict(step) for step in steps] for side, steps in rounds.items()}
        found = {"rounds": values, "tokens_per_caption": caption_tokens, "peak_bytes": peaks}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
