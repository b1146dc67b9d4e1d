"""What a recipe needs and costs on so many GPUs, before anything runs:

    python tools/plan.py RECIPE [key=value ...] --nodes N --gpus-per-node M --gpu h200 [--markdown] [--json FILE]

Parameters, tokens and FLOPs; memory per GPU by part for every ZeRO stage and micro-batch; steps, hours, GPU hours and
cost; what the loader has to deliver; bytes over the network; checkpoints; and warnings. No data, no weights and no GPU
are needed. Beside each figure stands how it came about: computed, from a data sheet, given, assumed or measured. With
--fit, MFU and links are those that a study of tools/scaling.py measured; what is given as an option of its own wins.

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
from cmpt.recipe import Absent, RecipeError, check_recipe, load_recipe, parse_duration
from cmpt.recipe.schema import Recipe
from gpus import GIB, GPUS, Gpu, find_gpu
from plan_fit import Measured, read_fit
from plan_run import (
    LATENCY_BETWEEN_S,
    LATENCY_INSIDE_S,
    LOADER_IMAGES_PER_CORE,
    Cluster,
    Job,
    KnownLink,
)
from plan_tables import MemoryTable, as_json, number, tables
from plan_warnings import warnings
from step_model import Link

USER_ERROR = 2
CLIP_VOCABULARY = 49_408
"""Of CLIP's byte-pair encoding (arXiv 2103.00020, section 2.4: 49,152 merges and bytes, with its two marks)."""
ASSUMED = {
    "caption_tokens": 20.0,
    "image_kb": 50.0,
    "images_per_core": LOADER_IMAGES_PER_CORE,
    "storage_gb_per_s": 2.0,
    "reserve_gib": 3.0,
    "host_memory_gb_per_s": 300.0,
}
"""Defaults of options; each is printed as assumed, or with where it was measured, beside the figures that it makes."""
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
    "host_memory_gb_per_s",
    "samples_per_epoch",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        job, absent = planned(options)
    except (RecipeError, ValueError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return USER_ERROR
    memory = MemoryTable.of(job)
    found = list(warnings(job, memory))
    command = " ".join(["tools/plan.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(report(job, memory, found, absent, options.markdown, command))
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(as_json(job, memory, found), indent=1) + "\n")
        except OSError as error:
            print(f"error: --json {options.json}: {error.strerror}", file=sys.stderr)
            return USER_ERROR
    return 0 if job.divides and job.fits(memory.own) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("recipe", metavar="RECIPE")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--gpus-per-node", type=int, default=8)
    made.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    made.add_argument("--mfu", type=float, help="share of the peak that the towers reach; default: a public figure")
    made.add_argument("--fit", metavar="FILE", help="fit.json of a study of tools/scaling.py: its MFU and links")
    made.add_argument("--network-gbit-per-node", type=float, metavar="X", help="one direction; default: NVIDIA's DGX")
    made.add_argument("--nvlink-gb-per-s", type=float, metavar="X", help="per GPU, one direction; default: data sheet")
    made.add_argument("--memory-gib", type=float, metavar="X", help="of a GPU; default: what the driver reports")
    made.add_argument("--price-per-gpu-hour", type=float, metavar="P")
    made.add_argument("--cores-per-gpu", type=float, metavar="C", help="of a node; not known by default")
    made.add_argument("--samples-per-epoch", type=int, metavar="N", help="needed where the recipe counts in epochs")
    told = {
        "reserve_gib": ("X", "of a GPU's memory, not for tensors"),
        "caption_tokens": ("T", "mean of a caption"),
        "image_kb": ("K", "mean bytes / 1000 of an encoded image"),
        "images_per_core": ("R", "that a core decodes in a second; the default was measured"),
        "storage_gb_per_s": ("X", "read by all nodes together"),
        "host_memory_gb_per_s": ("X", "of a node, for engine.offload_optimizer"),
    }
    for name, (metavar, what) in told.items():
        made.add_argument(_option(name), type=float, metavar=metavar, help=f"{what} ({ASSUMED[name]:g})")
    made.add_argument("--markdown", action="store_true", help="tables as Markdown")
    made.add_argument("--json", metavar="FILE", help="write every figure there too")
    return made


def planned(options: argparse.Namespace) -> tuple[Job, list[str]]:
    """The job, and what of the recipe is not at hand here. Raises ValueError."""
    assumed = [name for name in ASSUMED if getattr(options, name) is None]
    options = argparse.Namespace(**{**vars(options), **{name: ASSUMED[name] for name in assumed}})
    cluster = replace(cluster_of(options), assumed=frozenset(map(_option, assumed)))
    loaded = load_recipe(options.recipe, options.overrides)
    # Streams that the GPUs do not divide are a warning (Job.divides); the plan goes on.
    faults = check_recipe(loaded.recipe, 1, loaded.origins)
    if elsewhere := [fault for fault in faults if not isinstance(fault, Absent)]:
        raise RecipeError(elsewhere)
    recipe, pairs = with_known_sizes(loaded.recipe), loaded.recipe.engine.batch_size
    if cluster.world_size > pairs:
        split = f"--nodes {options.nodes} --gpus-per-node {options.gpus_per_node}"
        raise ValueError(f"{split}: must be at most engine.batch_size = {pairs:,} GPUs, a pair for each")
    samples = options.samples_per_epoch
    if samples is None:
        recipe, samples = without_epochs(recipe), 1
    if (
        recipe.engine.precision == "fp32"
        and cluster.fit_device is not None
        and cluster.fit_device in cluster.mfu_source
    ):
        told = "its MFU is a share of the bf16 peak; with engine.precision=fp32 give --mfu, a share of"
        raise ValueError(f"--fit {options.fit}: {told} {cluster.gpu.peak_fp32_flops / 1e12:g} TFLOP/s")
    machine = cluster.machine(recipe.engine)
    return Job(recipe, cluster, options.caption_tokens, 1e3 * options.image_kb, samples, machine), faults


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Raises ValueError for each option out of range."""
    faults = [
        f"{_option(name)} {value:g}: must be above 0 and finite"
        for name in POSITIVE
        if (value := getattr(options, name)) is not None and not (value > 0 and math.isfinite(value))
    ]
    if options.mfu is not None and not 0 < options.mfu <= 1:
        faults.append(f"--mfu {options.mfu:g}: must be above 0 and at most 1 (0.3 is 30 %)")
    if not (options.reserve_gib >= 0 and math.isfinite(options.reserve_gib)):
        faults.append(f"--reserve-gib {options.reserve_gib:g}: must be 0 or more, and finite")
    gpu, measured = None, None
    try:
        gpu = find_gpu(options.gpu)
    except ValueError as error:
        faults.append(str(error))
    try:
        measured = None if options.fit is None else read_fit(options.fit)
    except ValueError as error:
        faults.append(str(error))
    if faults or gpu is None:
        raise ValueError("\n".join(faults))
    reserve = GIB * options.reserve_gib
    memory = (gpu.memory_bytes if options.memory_gib is None else GIB * options.memory_gib) - reserve
    if memory <= 0:
        raise ValueError(f"--reserve-gib {options.reserve_gib:g}: leaves no memory")
    mfu, mfu_source = gpu.mfu, f"{gpu.mfu_source}; cmpt's own is not measured on a GPU"
    if measured is not None and measured.mfu is not None:
        mfu, mfu_source = measured.mfu, _source(options, measured)
    if options.mfu is not None:
        mfu, mfu_source = options.mfu, "given with --mfu"
    return Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=gpu,
        mfu=mfu,
        mfu_source=mfu_source,
        mfu_given=options.mfu is not None,
        inside=_inside(options, gpu, measured),
        between=_between(options, gpu, measured),
        memory_bytes=memory,
        reserve_bytes=reserve,
        memory_given=options.memory_gib is not None,
        images_per_core=options.images_per_core,
        cores_per_gpu=options.cores_per_gpu,
        storage_bytes_per_s=1e9 * options.storage_gb_per_s,
        host_memory_bytes_per_s=1e9 * options.host_memory_gb_per_s,
        fit_device=None if measured is None else measured.device,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )


def _inside(options: argparse.Namespace, gpu: Gpu, measured: Measured | None) -> KnownLink:
    given = None if options.nvlink_gb_per_s is None else 1e9 * options.nvlink_gb_per_s
    public = KnownLink(Link(LATENCY_INSIDE_S, gpu.link_bytes_per_s), "data sheet", "assumed")
    found = None if measured is None else measured.inside
    return _known(public, found, _source(options, measured), given, "--nvlink-gb-per-s")


def _between(options: argparse.Namespace, gpu: Gpu, measured: Measured | None) -> KnownLink:
    """Of no use with one node. Raises ValueError where there are several and nothing is known of their network."""
    given = None if options.network_gbit_per_node is None else 1e9 / 8 * options.network_gbit_per_node
    found = None if measured is None else measured.between
    if gpu.network_bits_per_s is None and given is None and found is None and options.nodes > 1:
        told = f"must be given for several nodes of {gpu.name}, no usual network is known"
        raise ValueError(f"--network-gbit-per-node: {told}")
    bandwidth = (gpu.network_bits_per_s or math.inf) / 8 * options.gpus_per_node
    public = KnownLink(Link(LATENCY_BETWEEN_S, bandwidth), "NVIDIA's DGX", "assumed")
    return _known(public, found, _source(options, measured), given, "--network-gbit-per-node")


def _source(options: argparse.Namespace, measured: Measured | None) -> str:
    return "" if measured is None else f"measured on {measured.device}, {options.fit}"


def _known(public: KnownLink, measured: Link | None, source: str, given: float | None, option: str) -> KnownLink:
    """The best of what is known of a link; `source`: of the measured one; `given`: its bytes per second."""
    known = public if measured is None else KnownLink(measured, source, source)
    if given is None:
        return known
    return KnownLink(Link(known.link.latency_s, given), f"given with {option}", known.latency_source)


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
    cluster = job.cluster
    head = [
        f"{job.recipe.run.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: {job.steps:,} steps, "
        f"{number(job.hours, 1)} hours, {number(job.hours * job.world_size)} GPU hours at MFU {cluster.mfu:.3g} "
        f"({cluster.mfu_source}); {number(memory.own.bytes / GIB, 1)} GiB per GPU",
    ]
    if markdown:
        head.insert(0, f"    python {command}\n")
    parts = [table.markdown() if markdown else table.text() for table in tables(job, memory)]
    mark = "- " if markdown else "! "
    lists = {"### Warnings" if markdown else "Warnings": found or ["none"]}
    if absent:
        lists["Not at hand on this machine, so not checked:"] = absent
    for title, lines in lists.items():
        parts.append("\n".join([title, *([""] if markdown else []), *(mark + line for line in lines)]))
    return "\n\n".join(["\n".join(head), *parts])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
