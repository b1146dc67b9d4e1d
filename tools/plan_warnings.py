"""What a plan finds wrong or wasteful, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from cmpt.models.flops import peak_flops
from gpus import GIB
from plan_run import Job, nearest_counts
from plan_tables import (
    MemoryTable,
    checkpoint_seconds,
    counted,
    duration,
    number,
    stall_seconds,
    write_seconds,
)
from step_model import COMMUNICATION

NETWORK_SHARE = 0.2
"""Of a step: communication beyond it is worth a warning."""
STALL_SHARE = 0.01


def warnings(job: Job, memory: MemoryTable) -> Iterator[str]:
    yield from _figures(job)
    yield from _split(job)
    yield from _shards(job)
    yield from _memory(job, memory)
    yield from _reading(job)
    yield from _decoding(job)
    yield from _network(job)
    yield from _checkpoints(job)


def _figures(job: Job) -> Iterator[str]:
    """Where those behind the time of a step are of something else."""
    cluster, precision = job.cluster, job.recipe.engine.precision
    gpu, device = cluster.gpu, cluster.fit_device
    if device is not None:
        sources = (cluster.mfu_source, cluster.inside.bandwidth_source, cluster.between.bandwidth_source)
        same = gpu.name.split("-")[0].upper() in device.upper() and peak_flops(device) == gpu.peak_bf16_flops
        if not same and any(device in source for source in sources):
            yield f"--fit was measured on {device}, not on this {gpu.name}: what is taken from it need not hold here"
    if precision == "fp32":
        full, plain = gpu.peak_bf16_flops / 1e12, gpu.peak_fp32_flops / 1e12
        told = f"engine.precision=fp32 leaves the tensor cores idle: {plain:g} TFLOP/s at most, where bf16 has {full:g}"
        yield told + ("" if cluster.mfu_given else "; the MFU is one of bf16, so the time says little (--mfu)")


def _split(job: Job) -> Iterator[str]:
    if job.divides:
        return
    streams, world, per_node = job.recipe.data.streams, job.world_size, job.cluster.gpus_per_node
    batch = job.recipe.engine.batch_size
    sizes = nearest_counts(streams, world, per_node)
    nearest = " or ".join(counted(size // per_node, "node") for size in sizes)
    told = f"the nearest that do: {nearest}" if sizes else "no number of whole nodes does"
    other = f"a data.streams that is a multiple of {world:,} and divides engine.batch_size"
    if batch % world:
        other = f"another engine.batch_size too, for {world:,} GPUs do not divide {batch:,} either"
    yield f"the run would not start: {world:,} GPUs do not divide data.streams = {streams:,}; {told}; else take {other}"


def _shards(job: Job) -> Iterator[str]:
    shards, streams, world = job.shards, job.recipe.data.streams, job.world_size
    if shards is None:
        yield "the number of shards is not known here: wildcards of data.train match nothing on this machine"
    elif shards < world:
        yield (
            f"fewer shards ({shards:,}) than GPUs ({world:,}): several GPUs read the same shard, each a slice of it; "
            "smaller shards would spread the reading"
        )
    elif shards < streams:
        yield f"fewer shards ({shards:,}) than data.streams = {streams:,}: streams share shards, each reading a slice"


def _memory(job: Job, memory: MemoryTable) -> Iterator[str]:
    engine, own, stage = job.recipe.engine, memory.own, job.stage()
    if stage != engine.zero_stage:
        yield f"engine.zero_stage = {engine.zero_stage} does nothing on one GPU: it runs as stage 0"
    if not job.fits(own):
        at_once, there = memory.micro or job.pairs, job.cluster.memory_bytes / GIB
        what = f"{counted(at_once, 'pair')} at once need {own.bytes / GIB:.1f} GiB of {there:.1f}"
        yield f"the recipe does not fit: {what}; {_fitting(job, memory)}"
    if memory.micro is not None and job.fits(memory.peaks[stage, None]):
        yield (
            f"engine.micro_batch_size = {memory.micro} is not needed: all {job.pairs:,} pairs fit at once, without its "
            "extra forward pass"
        )
    if stage == 3:
        sent = {at: sum(job.sent_bytes(at).values()) for at in (1, 2, 3)}
        enough = [at for at in (1, 2) if job.fits(memory.peaks[at, memory.micro])]
        if enough:
            at = enough[0]
            more = (memory.peaks[at, memory.micro].bytes - own.bytes) / GIB
            calls = {other: sum(job.calls(other).values()) for other in (3, at)}
            moved = f"{sent[3] / sent[at]:.2f} times the bytes, in {calls[3]:,} collectives a step, not {calls[at]:,}"
            told = "stage 3 buys nothing" if sent[3] >= sent[at] else "stage 3 is not needed for memory"
            yield f"{told}: stage {at} fits too ({more:+.1f} GiB), and stage 3 moves {moved}"


def _fitting(job: Job, memory: MemoryTable) -> str:
    """What to change where the recipe does not fit."""
    stage, most = job.stage(), memory.most_at_once[job.stage()]
    if most == job.pairs:
        return "all pairs at once do: engine.micro_batch_size=null"
    if most is not None:
        return f"engine.micro_batch_size={most} fits, for one forward pass more"
    if not job.recipe.model.activation_checkpointing:
        return "no micro-batch fits; try model.activation_checkpointing=true"
    fitting = [str(other) for other, most in memory.most_at_once.items() if most is not None]
    return f"no micro-batch fits at stage {stage}" + (f"; some do at stage {', '.join(fitting)}" if fitting else "")


def _reading(job: Job) -> Iterator[str]:
    there, how = job.cluster.storage_bytes_per_s, job.cluster.how
    if job.read_bytes_per_s > there:
        yield (
            f"reading is too slow: {number(job.read_bytes_per_s / 1e9, 1)} GB/s are needed, at "
            f"{job.image_bytes / 1e3:g} kB per image ({how('--image-kb')}); storage gives {there / 1e9:g} "
            f"({how('--storage-gb-per-s')})"
        )


def _decoding(job: Job) -> Iterator[str]:
    if not job.decodes_too_slowly:
        return
    needed, cores, workers = job.cores_needed, job.cluster.cores_per_gpu, job.recipe.data.workers
    if job.recipe.decode.backend == "auto":
        where = "on nodes without NVIDIA DALI, where decode.backend=auto decodes on the CPU"
    else:
        where = "on the CPU; decode.backend=dali decodes on the GPU (not measured)"
    if cores is not None and cores <= workers:
        there = f"{cores:g} are there (--cores-per-gpu)"
    else:
        there = f"data.workers = {workers} uses no more than {workers} of them"
        if cores is None:
            there += ", and how many there are is not known (--cores-per-gpu)"
    rate = f"{job.cluster.images_per_core:g} images/s and core"
    yield (
        f"the loader is too slow {where}: {number(needed, 1)} cores per GPU are needed at {rate} (--images-per-core); "
        f"{there}"
    )


def _network(job: Job) -> Iterator[str]:
    for phase in job.phase_plans:
        share = sum(phase.terms[kind] for kind in COMMUNICATION) / phase.step_s
        if share > NETWORK_SHARE:
            worst = max(COMMUNICATION, key=lambda kind: phase.terms[kind])
            yield (
                f"network-bound: communication would be {share:.0%} of a step of phase {phase.planned.phase.name}, "
                f"most of it {worst}, where compute hides none of it; more pairs per GPU or a faster network help"
            )


def _checkpoints(job: Job) -> Iterator[str]:
    every, write, stall = checkpoint_seconds(job), write_seconds(job), stall_seconds(job)
    if write > every:
        yield (
            f"a checkpoint takes {duration(write)} to write, at {job.cluster.storage_bytes_per_s / 1e9:g} GB/s of "
            f"storage ({job.cluster.how('--storage-gb-per-s')}), and one is due every {duration(every)}: some would be "
            "left out; raise run.checkpoint_every"
        )
    if stall > STALL_SHARE * every:
        yield f"checkpoints hold training up for {stall / every:.1%} of its time; raise run.checkpoint_every"
    lost = every / 2 * job.world_size / 3600
    if every > 3600:
        yield (
            f"a checkpoint every {number(every / 3600, 1)} hours: a fault loses {number(lost)} GPU hours on average; "
            "lower run.checkpoint_every (tools/scaling.py --simulate finds the best interval)"
        )
