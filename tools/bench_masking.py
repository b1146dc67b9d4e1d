"""What masking costs: from decoded uint8 images to the packed, normalised patches that the vision tower gets.

    python tools/bench_masking.py [--preset ViT-B-16] [--batch-size 32] [--rounds 9]

Sides, alternating in one process, on the same images (of the embedded clip art, at the model's image size): cmpt's
stage with cluster masking, with random masking and without any; and the plain way, all L x L similarities in torch. On
a GPU also the memory floor: the time to read the pixels once and write the kept patches once, at the bandwidth that a
large copy reaches there. Then training steps of cmpt (tools/bench_step.py), and the share of them that masking takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench_step import batches_of, cmpt_step, now, recipe_of
from cmpt.batch import ImageTextBatch
from cmpt.dist import process_group
from cmpt.masking.strategies import MaskStage
from cmpt.recipe.schema import Masking, Recipe

GOALS = {"speed": 5.0, "share_cpu": 0.03, "share_gpu": 0.01, "floor": 2.5}
WARM_UP = 8  # rounds, which also settle the threshold
_COPY_BYTES = 1 << 30
Side = Callable[[ImageTextBatch], object]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ViT-B-16", help="a size that open_clip has too (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after eight that warm up")
    parser.add_argument("--steps", type=int, default=3, help="training steps to time; 0: none (default: %(default)s)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measured value there")
    options = parser.parse_args(arguments)
    options.compile = False  # of bench_step
    _, _, device = process_group.start()
    try:
        report(options, device)
    finally:
        process_group.stop()
    return 0


def report(options: argparse.Namespace, device: torch.device) -> None:
    recipe = recipe_of(options)
    batches = batches_of(recipe, max(2, options.steps + 1), device)
    sides = sides_of(recipe, device)
    seconds = timed(sides, batches, options.rounds, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.preset}, {recipe.image.size} pixels, batch {options.batch_size}, {options.precision}, {name}, "
          f"torch {torch.__version__}, median of {options.rounds} rounds\n")  # fmt: skip
    print("| | µs per image | over rounds |\n|-|-:|-:|")
    for side, times in seconds.items():
        per_image = [1e6 * s / options.batch_size for s in times]
        print(f"| {side} | {statistics.median(per_image):.1f} | {min(per_image):.1f} to {max(per_image):.1f} |")
    plain, ours = seconds["all L x L similarities, plain torch"], seconds["cmpt, cluster"]
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    print(f"\nplain against cmpt: {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}), "
          f"aim {GOALS['speed']:.0f}x")  # fmt: skip
    found: dict[str, object] = {"seconds": seconds}
    if device.type == "cuda":
        floor, rate = memory_floor(recipe, batches[1], device)
        found["floor_s"] = floor
        print(f"memory floor at {rate / 1e12:.2f} TB/s: {1e6 * floor / options.batch_size:.3f} µs per image; "
              f"cmpt takes {statistics.median(ours) / floor:.2f} times as long, aim {GOALS['floor']}")  # fmt: skip
    if options.steps:
        step = cmpt_step(options, recipe, "cluster", device)
        step(batches[0])
        found["step_s"] = steps = [step(batch).seconds for batch in batches[1:]]
        share = statistics.median(ours) / statistics.median(steps)
        goal = GOALS["share_gpu" if device.type == "cuda" else "share_cpu"]
        print(f"a training step takes {statistics.median(steps):.3f} s; masking is {100 * share:.2f} % of it, "
              f"aim {100 * goal:.0f} %")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def sides_of(recipe: Recipe, device: torch.device) -> dict[str, Side]:
    assert recipe.model.patch_size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def stage(strategy: str) -> Side:
        mask = MaskStage(Masking(strategy=strategy), recipe.image, recipe.model.patch_size or 0, seed=0, dtype=dtype)
        return lambda batch: mask(batch.images_BCHW, batch.ordinal_B, batch.valid_B)

    threshold: list[float] = []
    masking, patch = recipe.masking, recipe.model.patch_size

    def plain(batch: ImageTextBatch) -> object:
        if not threshold:
            mask = MaskStage(masking, recipe.image, patch, seed=0)
            threshold.append(mask(batch.images_BCHW, batch.ordinal_B).threshold or 0.5)
        return all_pairs(batch.images_BCHW, recipe, threshold[0])

    return {
        "cmpt, cluster": stage("cluster"),
        "cmpt, random": stage("random"),
        "cmpt, no masking": stage("none"),
        "all L x L similarities, plain torch": plain,
    }


def all_pairs(images_BCHW: Tensor, recipe: Recipe, threshold: float) -> tuple[Tensor, Tensor]:
    """The method written down directly: kept patches in one sequence and how many each image has."""
    image, patch, masking = recipe.image, recipe.model.patch_size, recipe.masking
    assert patch
    device = images_BCHW.device
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (image.mean, image.std))
    pixels_BCHW = (images_BCHW.float() / 255 - mean) / std
    patches_BLP = torch.nn.functional.unfold(pixels_BCHW, patch, stride=patch).transpose(1, 2)
    centred_BLP = patches_BLP - patches_BLP.mean(dim=-1, keepdim=True)
    unit_BLP = centred_BLP / (centred_BLP.norm(dim=-1, keepdim=True) + 1e-6)
    similarity_BLL = unit_BLP @ unit_BLP.transpose(1, 2)
    batch, patches = similarity_BLL.shape[:2]
    anchors_BK = torch.rand(batch, patches, device=device).topk(int(masking.anchor_ratio * patches)).indices
    nearest_BL = similarity_BLL.gather(1, anchors_BK[:, :, None].expand(-1, -1, patches)).amax(dim=1)
    hidden_BL = nearest_BL > threshold
    order_BL = torch.rand(batch, patches, device=device).add_(hidden_BL).argsort(dim=1, descending=True)
    least = int(masking.min_ratio * patches)
    hidden_B = hidden_BL.sum(dim=1, keepdim=True).clamp(least, patches - 1)
    keep_BL = torch.zeros_like(hidden_BL).scatter(1, order_BL, torch.arange(patches, device=device) >= hidden_B)
    return patches_BLP[keep_BL], keep_BL.sum(dim=1)


def timed(
    sides: dict[str, Side], batches: list[ImageTextBatch], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every side in every round; the order of the sides rotates."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    for number in range(-WARM_UP, rounds):
        batch = batches[number % len(batches)]
        for side in order:
            began = now(device)
            sides[side](batch)
            if number >= 0:
                seconds[side].append(now(device) - began)
        order.append(order.pop(0))
    return seconds


def memory_floor(recipe: Recipe, batch: ImageTextBatch, device: torch.device) -> tuple[float, float]:
    """Seconds to read the pixels once and write half of the patches in bf16, and the bytes/s that this assumes."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(9):
        began = now(device)
        target.copy_(source)
        times.append(now(device) - began)
    rate = 2 * _COPY_BYTES / statistics.median(times)
    pixels = batch.images_BCHW.numel()
    return (pixels + 2 * pixels * (1 - recipe.masking.ratio)) / rate, rate


if __name__ == "__main__":
    sys.exit(main())
