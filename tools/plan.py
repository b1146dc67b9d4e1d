"""What a recipe needs and costs on so many GPUs, before anything runs:

    python tools/plan.py RECIPE [key=value ...] --nodes N --gpus-per-node M --gpu h200 [--markdown] [--json FILE]

Parameters, tokens and FLOPs; memory per GPU by part for every ZeRO stage and micro-batch; steps, hours, GPU hours and
cost; what the loader has to deliver; bytes over the network; checkpoints; and warnings. No data, no weights and no GPU
are needed. Beside each figure stands how it came about: computed, from a data sheet, given, assumed or measured.

Exit code 0: the recipe can run so; 1: it cannot (said as warnings); 2: the question was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed is asked for its settings only

from cmpt.data.tokenizer import open_tokenizer
from cmpt.recipe import RecipeError, check_recipe, load_recipe, parse_duration
from cmpt.recipe.schema import Recipe
from gpus import find_gpu
from plan_run import LOADER_IMAGES_PER_CORE, Cluster, Job, usable_bytes
from plan_tables import MemoryTable, as_json, tables
from plan_warnings import split_faults, warnings

USER_ERROR = 2
CLIP_VOCABULARY = 49_408
"""Of CLIP's byte-pair encoding (arXiv 2103.00020, section 2.4: 49,152 merges and bytes, with its two marks)."""
# Defaults that are neither measured nor known: each is printed as assumed beside the figures that it makes.
CAPTION_TOKENS, IMAGE_KB, STORAGE_GB_PER_S, RESERVE_GIB = 20.0, 50.0, 2.0, 3.0
POSITIVE = (
    "nodes",
    "gpus_per_node",
    "network_gbit_per_node",
    "nvlink_gb_per_s",
    "memory_gib",
    "price_per_gpu_hour",
    "caption_tokens",
    "image_kb",
    "images_per_core",
    "cores_per_gpu",
    "storage_gb_per_s",
    "samples_per_epoch",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        job, absent, faults = planned(options)
    except (RecipeError, ValueError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return USER_ERROR
    memory = MemoryTable.of(job)
    found = [f"the recipe cannot run so: {fault}" for fault in faults] + list(warnings(job, memory))
    command = " ".join(["tools/plan.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(report(job, memory, found, absent, options.markdown, command))
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(as_json(job, memory, found), indent=1) + "\n")
        except OSError as error:
            print(f"error: --json {options.json}: {error.strerror}", file=sys.stderr)
            return USER_ERROR
    return 1 if faults or not job.fits(memory.own) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", metavar="RECIPE")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus-per-node", type=int, default=8)
    made.add_argument("--gpu", required=True, metavar="NAME", help="h200, h100, a100, a100-40, l40s, b200")
    made.add_argument(
        "--mfu", type=float, help="share of the peak that the towers reach, 0 to 1; default: a public figure"
    )
    made.add_argument("--network-gbit-per-node", type=float, metavar="X", help="one direction; default: NVIDIA's DGX")
    made.add_argument("--nvlink-gb-per-s", type=float, metavar="X", help="per GPU, one direction; default: data sheet")
    made.add_argument("--memory-gib", type=float, metavar="X", help="of a GPU; default: what the driver reports")
    made.add_argument(
        "--reserve-gib", type=float, default=RESERVE_GIB, metavar="X", help="of it not for tensors (%(default)g)"
    )
    made.add_argument("--price-per-gpu-hour", type=float, metavar="P")
    made.add_argument(
        "--caption-tokens", type=float, default=CAPTION_TOKENS, metavar="T", help="mean (%(default)g, assumed)"
    )
    made.add_argument(
        "--image-kb", type=float, default=IMAGE_KB, metavar="K", help="mean bytes / 1000 (%(default)g, assumed)"
    )
    made.add_argument(
        "--images-per-core", type=float, default=LOADER_IMAGES_PER_CORE, metavar="R", help="loader (%(default)g)"
    )
    made.add_argument("--cores-per-gpu", type=float, metavar="C", help="to warn where they are too few")
    told = f"storage of all nodes together ({STORAGE_GB_PER_S:g}, assumed)"
    made.add_argument("--storage-gb-per-s", type=float, metavar="X", help=told)
    made.add_argument("--samples-per-epoch", type=int, metavar="N", help="needed where the recipe counts in epochs")
    made.add_argument("--markdown", action="store_true", help="tables as Markdown")
    made.add_argument("--json", metavar="FILE", help="write every figure there too")
    return made


def planned(options: argparse.Namespace) -> tuple[Job, list[str], list[str]]:
    """The job, what of the recipe is not at hand here, and what keeps it from running so. Raises ValueError."""
    cluster = cluster_of(options)
    loaded = load_recipe(options.recipe, options.overrides)
    # What does not divide by the GPUs is a warning; the plan goes on. Anything else ends it.
    alone, absent = split_faults(check_recipe(loaded.recipe, 1, loaded.origins))
    if alone:
        raise RecipeError(alone)
    together, _ = split_faults(check_recipe(loaded.recipe, cluster.world_size, loaded.origins))
    recipe = with_known_sizes(loaded.recipe)
    samples = options.samples_per_epoch
    if samples is None:
        recipe, samples = without_epochs(recipe), 1
    job = Job(recipe, cluster, options.caption_tokens, 1e3 * options.image_kb, samples, cluster.machine())
    return job, absent, together


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Raises ValueError for each option out of range."""
    faults = [
        f"{_option(name)} {value:g}: must be above 0"
        for name in POSITIVE
        if (value := getattr(options, name)) is not None and not (value > 0 and math.isfinite(value))
    ]
    if options.mfu is not None and not 0 < options.mfu <= 1:
        faults.append(f"--mfu {options.mfu:g}: must be above 0 and at most 1 (0.3 is 30 %)")
    if options.reserve_gib < 0:
        faults.append(f"--reserve-gib {options.reserve_gib:g}: must not be negative")
    gpu = None
    try:
        gpu = find_gpu(options.gpu)
    except ValueError as error:
        faults.append(str(error))
    if (
        gpu is not None
        and options.network_gbit_per_node is None
        and gpu.network_bits_per_s is None
        and options.nodes > 1
    ):
        faults.append(
            f"--network-gbit-per-node: must be given for several nodes of {gpu.name}, no usual network is known"
        )
    if faults or gpu is None:
        raise ValueError("\n".join(faults))
    network = options.network_gbit_per_node
    bits = 1e9 * network if network is not None else (gpu.network_bits_per_s or 0) * options.gpus_per_node
    memory = usable_bytes(gpu, options.memory_gib, options.reserve_gib)
    if memory <= 0:
        raise ValueError(f"--reserve-gib {options.reserve_gib:g}: leaves no memory")
    return Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=gpu,
        mfu=gpu.mfu if options.mfu is None else options.mfu,
        network_bytes_per_s=bits / 8 or gpu.link_bytes_per_s,
        link_bytes_per_s=gpu.link_bytes_per_s if options.nvlink_gb_per_s is None else 1e9 * options.nvlink_gb_per_s,
        memory_bytes=memory,
        images_per_core=options.images_per_core,
        cores_per_gpu=options.cores_per_gpu,
        storage_bytes_per_s=1e9 * (options.storage_gb_per_s or STORAGE_GB_PER_S),
        storage_given=options.storage_gb_per_s is not None,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )


def with_known_sizes(recipe: Recipe) -> Recipe:
    """With the vocabulary filled in, of the tokenizer where it is at hand."""
    if recipe.model.vocab_size is not None:
        return recipe
    if recipe.tokenizer.kind == "clip_bpe":
        size = CLIP_VOCABULARY
    else:
        try:
            size = open_tokenizer(recipe.tokenizer, recipe.model.context_length).vocab_size
        except (OSError, ValueError) as error:
            told = "the tokenizer is not at hand here, so the size of its vocabulary must be given: model.vocab_size=N"
            raise ValueError(f"tokenizer.path = {recipe.tokenizer.path}: {told}") from error
    return replace(recipe, model=replace(recipe.model, vocab_size=size))


def without_epochs(recipe: Recipe) -> Recipe:
    """Without what only happens every so many epochs, for an epoch's length is not known. Raises ValueError where the
    length of the run is counted in epochs."""
    lengths = {"run.duration": recipe.run.duration, "run.checkpoint_every": recipe.run.checkpoint_every}
    lengths |= {f"phases.{index}.duration": phase.duration for index, phase in enumerate(recipe.phases)}
    lengths |= {"optimizer.warmup": recipe.optimizer.warmup, "run.log_every": recipe.run.log_every}
    lengths |= {"run.stop_after": recipe.run.stop_after}
    for key, text in lengths.items():
        if text is not None and parse_duration(text).unit == "epochs":
            raise ValueError(f'{key} = "{text}": needs --samples-per-epoch N, the samples of all shards together')

    def known(text: str | None) -> str | None:
        return None if text is None or parse_duration(text).unit == "epochs" else text

    evaluation, guard = recipe.evaluation, recipe.guard
    evaluation = replace(evaluation, every=known(evaluation.every))
    return replace(recipe, evaluation=evaluation, guard=replace(guard, weights_every=known(guard.weights_every)))


def report(
    job: Job, memory: MemoryTable, found: Sequence[str], absent: Sequence[str], markdown: bool, command: str
) -> str:
    gpu = job.cluster.gpu
    source = gpu.mfu_source if job.cluster.mfu == gpu.mfu else "given"
    head = [
        f"{job.recipe.run.name} on {job.cluster.nodes} x {job.cluster.gpus_per_node} {gpu.name}: "
        f"{job.steps:,} steps, {job.hours:,.1f} hours, {job.hours * job.world_size:,.0f} GPU hours at MFU "
        f"{job.cluster.mfu:g} ({source}; cmpt's own is not measured on a GPU); "
        f"{memory.own.bytes / 2**30:.1f} GiB per GPU",
    ]
    if markdown:
        head.insert(0, f"    python {command}\n")
    parts = [table.markdown() if markdown else table.text() for table in tables(job, memory)]
    mark = "- " if markdown else "! "
    parts.append(
        "\n".join(["### Warnings\n" if markdown else "Warnings", *(mark + line for line in found or ["none"])])
    )
    if absent:
        parts.append(f"Not at hand on this machine, so not checked: {len(absent)} of the recipe's files or packages.")
    return "\n\n".join(["\n".join(head), *parts])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
