"""How long training data take to get going, and whether a long run's memory stays flat.

    python tools/bench_start.py [--shards 10000] [--epochs 100]

Answered on the embedded clip art: how long after its imports a process has its first batch from --shards shards (links
to one shard of 539 samples), with and without indexes; whether a start at 90 % of an epoch takes longer than one at its
beginning; what broken samples cost; and what the memory of a process is over --epochs epochs of the embedded data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import webdataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout without an install

from cmpt.data.loader import Loader  # noqa: E402
from cmpt.data.streams import LoaderState  # noqa: E402
from cmpt.data.tokenizer import open_tokenizer  # noqa: E402
from cmpt.recipe import check_recipe, load_recipe  # noqa: E402
from cmpt.train import build_loader  # noqa: E402

RECIPE = REPOSITORY / "recipes" / "quickstart.yaml"
SHARD = REPOSITORY / "cmpt" / "data" / "clipart" / "train-0000.tar"
PAGE = os.sysconf("SC_PAGE_SIZE")


def loader_of(overrides: Sequence[str]) -> Loader:
    """From the recipe's files to a loader, as training does it."""
    recipe = load_recipe(str(RECIPE), overrides).recipe
    faults = check_recipe(recipe)
    if faults:
        raise SystemExit("\n".join(f"error: {fault}" for fault in faults))
    return build_loader(recipe, open_tokenizer(recipe.tokenizer, recipe.model.context_length), 0, 1)


def first_batch_s(overrides: Sequence[str]) -> float:
    """Seconds from reading the recipe to the first batch."""
    began = time.perf_counter()
    loader = loader_of(overrides)
    batches = loader.batches(loader.initial_state())
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def starts(shards: int, rounds: int) -> None:
    """Each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="cmpt-bench-") as name:
        folder = Path(name)
        for number in range(shards):
            (folder / f"{number:06d}.tar").symlink_to(SHARD)
        overrides = [
            f"data.train.0.urls=['{folder}/{{000000..{shards - 1:06d}}}.tar']",
            f"data.cache_folder={folder}/cache",
        ]
        command = [sys.executable, __file__, "--first-batch", *overrides]
        taken = []
        for _ in range(rounds + 1):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken.append(float(done.stdout.split()[-1]))
    print(f"| first batch from {shards:,} shards without indexes, once | {taken[0]:.1f} s |")
    print(f"| with indexes, median of {rounds} | {statistics.median(taken[1:]):.2f} s (aim 5) |", flush=True)


def resumes(rounds: int) -> None:
    """A start in the middle against one at the beginning, in turns; loaders anew, so that no shard is open."""
    with tempfile.TemporaryDirectory(prefix="cmpt-bench-") as name:
        overrides = [f"data.cache_folder={name}", "engine.batch_size=64"]
        loader = loader_of(overrides)
        fresh = loader.initial_state()
        steps = loader.samples_per_epoch * 9 // 10 // 64
        part = loader.samples_per_epoch * 9 // 10 // len(fresh.cursors)
        late = LoaderState(steps, {stream: ((0, part),) for stream in fresh.cursors})
        taken: dict[str, list[float]] = {"fresh": [], "late": []}
        for _ in range(rounds):
            for kind, state in (("fresh", fresh), ("late", late)):
                loader = loader_of(overrides)
                began = time.perf_counter()
                batches = loader.batches(state)
                next(batches)
                taken[kind].append(time.perf_counter() - began)
                batches.close()
    medians = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    ratios = sorted(late / fresh for late, fresh in zip(taken["late"], taken["fresh"], strict=True))
    print(f"| first batch of 64 at the beginning, median of {rounds} | {medians['fresh'] * 1000:.0f} ms |")
    times = f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}; aim 2)"
    print(f"| after a resume at 90 % of the epoch | {medians['late'] * 1000:.0f} ms, {times} |", flush=True)


def damage(rounds: int) -> None:
    """The same good samples with and without broken ones among them, a twentieth of all, in turns."""
    with tempfile.TemporaryDirectory(prefix="cmpt-bench-") as name:
        loaders = {}
        for kind in ("clean", "dirty"):
            path = Path(name) / f"{kind}.tar"
            write_shard(path, broken=kind == "dirty")
            loaders[kind] = loader_of(
                [f"data.train.0.urls=[{path}]", f"data.cache_folder={name}", "engine.batch_size=64", "data.workers=1"]
            )
        rates: dict[str, list[float]] = {"clean": [], "dirty": []}
        for _ in range(rounds):
            for kind, loader in loaders.items():
                batches = loader.batches(loader.initial_state())
                began, used = time.process_time(), 0
                for _, (batch, _) in zip(range(8), batches, strict=False):
                    used += int(batch.valid_B.sum())
                batches.close()
                rates[kind].append(used / (time.process_time() - began))
    ratios = sorted(dirty / clean for dirty, clean in zip(rates["dirty"], rates["clean"], strict=True))
    print(
        f"| used images per second of processor time with 5 % broken samples, against none | "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}; the lost samples explain 0.95) |",
        flush=True,
    )


def write_shard(path: Path, broken: bool) -> None:
    """The samples of the embedded shard; with broken ones after every 19th: cut, garbage, a page, empty, no caption."""
    with tarfile.open(SHARD) as source, webdataset.TarWriter(str(path)) as writer:
        members = {member.name: source.extractfile(member) for member in source.getmembers() if member.isfile()}
        content = {name: file.read() for name, file in members.items() if file is not None}
        for number, name in enumerate(sorted(name for name in content if name.endswith(".jpg"))):
            image, caption = content[name], content[f"{name[:-4]}.json"]
            writer.write({"__key__": f"{number:06d}", "jpg": image, "json": caption})
            if broken and number % 19 == 18:
                bad = (image[: len(image) // 2], bytes(len(image)), b"<html>404</html>", b"", image)[number // 19 % 5]
                more = {} if bad is image else {"json": caption}
                writer.write({"__key__": f"{number:06d}-bad", "jpg": bad, **more})


def memory(epochs: int) -> None:
    """Resident memory of this process at some epochs; with small images, which leaves what order and indexes keep."""
    with tempfile.TemporaryDirectory(prefix="cmpt-bench-") as name:
        loader = loader_of(
            [f"data.cache_folder={name}", "image.size=16", "engine.batch_size=128", "model.patch_size=8"]
        )
        shown = sorted({1, max(1, epochs // 10), max(1, epochs // 2), epochs})
        cells = []
        began = time.perf_counter()
        batches = loader.batches(loader.initial_state())
        for batch, state in batches:
            reached = state.step * len(batch.keys) / loader.samples_per_epoch
            if reached >= shown[0]:
                cells.append(f"{resident_bytes() / 2**20:.0f} MiB after {shown.pop(0)}")
                print(f"  {cells[-1]}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
            if not shown:
                break
        batches.close()
    print(f"| resident memory over epochs | {', '.join(cells)} |", flush=True)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000, help="shards of the start (default 10,000)")
    parser.add_argument("--epochs", type=int, default=100, help="of the memory's course (default 100)")
    parser.add_argument("--rounds", type=int, default=7, help="repeats of each timing (default 7)")
    parser.add_argument("--first-batch", nargs="+", metavar="key=value", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.first_batch:
        print(first_batch_s(options.first_batch))
        return 0
    for name in ("shards", "epochs", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    print("| | |\n|-|-:|")
    starts(options.shards, options.rounds)
    resumes(options.rounds)
    damage(options.rounds)
    memory(options.epochs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
