"""Retrieval on random features against the bare matrix product that it cannot do without: seconds and memory.

    python tools/bench_retrieval.py [--images 50000] [--texts 50000] [--dim 512] [--rounds 3]

Each side runs in a process of its own, in turn, with the same threads. "bare" is images times captions once, in fp32
and the same tiles, each over the one before: fresh memory for every block of it would cost more than the counting. The
retrieval counts in both directions within one such product. The peak is the resident memory of the whole process, torch
and the features included (Linux).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from cmpt.evals import retrieval

SIDES = ("bare", "retrieval")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--texts", type=int, default=50_000, help="a multiple of the images (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="width of the features (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # measure here, print JSON
    options = parser.parse_args(arguments)
    if options.texts % options.images or min(options.images, options.dim, options.rounds) < 1:
        parser.error("--texts must be a multiple of --images, and all of them at least 1")
    if options.only:
        print(json.dumps(measured_here(options)))
        return 0
    print(f"{options.images:,} images, {options.texts:,} texts, width {options.dim}, fp32, CPU, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.rounds}")  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--only", side]
            command += [f"--{name}={getattr(options, name)}" for name in ("images", "texts", "dim")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for side in SIDES:
        seconds = [one["seconds"] for one in found[side]]
        peak = max(one["peak_bytes"] for one in found[side])
        print(f"{side:10} {statistics.median(seconds):8.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
              f"peak {peak / 1e9:.2f} GB")  # fmt: skip
    ratios = [ours["seconds"] / bare["seconds"] for ours, bare in zip(found["retrieval"], found["bare"], strict=True)]
    print(f"retrieval is {statistics.median(ratios):.2f} bare products ({min(ratios):.2f} to {max(ratios):.2f})")
    return 0


def measured_here(options: argparse.Namespace) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    image_NE, text_ME = (
        F.normalize(torch.randn(count, options.dim, generator=generator), dim=-1)
        for count in (options.images, options.texts)
    )
    began = time.perf_counter()
    if options.only == "bare":
        memory = torch.empty(retrieval.TILE)
        for text_BE in text_ME.split(retrieval.TILE[1]):
            for image_BE in image_NE.split(retrieval.TILE[0]):
                torch.mm(image_BE, text_BE.T, out=memory[: len(image_BE), : len(text_BE)])
    else:
        retrieval.recalls(image_NE, text_ME, [options.texts // options.images] * options.images, 0, 1)
    seconds = time.perf_counter() - began
    # Not getrusage: its peak begins with that of the process that started this one.
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return {"seconds": seconds, "peak_bytes": 1024 * int(peak)}


if __name__ == "__main__":
    sys.exit(main())
