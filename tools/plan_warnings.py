"""What a plan finds wrong or wasteful, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from gpus import GIB
from plan_run import Job, nearest_counts
from plan_tables import MemoryTable, checkpoint_seconds, stages, stall_seconds, write_seconds
from step_model import COMMUNICATION

NETWORK_SHARE = 0.2
"""Of a step: communication beyond it is worth a warning."""
STALL_SHARE = 0.01
_NOT_AT_HAND = ("do not exist", "no such file", "matches no file", "not installed here")


def split_faults(faults: list[str]) -> tuple[list[str], list[str]]:
    """What keeps the recipe from running anywhere, and what only is not on this machine."""
    absent = [fault for fault in faults if any(told in fault for told in _NOT_AT_HAND)]
    return [fault for fault in faults if fault not in absent], absent


def warnings(job: Job, memory: MemoryTable) -> Iterator[str]:
    yield from _split(job)
    yield from _shards(job)
    yield from _memory(job, memory)
    yield from _rates(job)
    yield from _checkpoints(job)


def _split(job: Job) -> Iterator[str]:
    batch, streams, world = job.recipe.engine.batch_size, job.recipe.data.streams, job.world_size
    if batch % world:
        yield f"engine.batch_size = {batch:,} does not divide by {world:,} GPUs"
    if batch % streams:
        yield f"engine.batch_size = {batch:,} is no multiple of data.streams = {streams:,}"
    if streams % world:
        sizes = nearest_counts(streams, world, job.cluster.gpus_per_node)
        nearest = " or ".join(f"{size // job.cluster.gpus_per_node} nodes" for size in sizes)
        told = f"the nearest that do: {nearest}" if sizes else "no number of whole nodes does"
        yield (
            f"{world:,} GPUs do not divide data.streams = {streams:,}, so the run would not start; {told}; "
            f"or another data.streams that is a multiple of {world:,} and divides engine.batch_size"
        )


def _shards(job: Job) -> Iterator[str]:
    shards, streams, world = job.shards, job.recipe.data.streams, job.world_size
    if shards is None:
        yield "the number of shards is not known here: wildcards of data.train match nothing on this machine"
    elif shards < world:
        yield (
            f"{shards:,} shards are fewer than {world:,} GPUs: several GPUs read the same shard, each a slice of it; "
            "smaller shards would spread the reading"
        )
    elif shards < streams:
        yield f"{shards:,} shards are fewer than data.streams = {streams:,}: streams share shards, each reading a slice"


def _memory(job: Job, memory: MemoryTable) -> Iterator[str]:
    engine, own, stage = job.recipe.engine, memory.own, job.stage()
    if stage != engine.zero_stage:
        yield f"engine.zero_stage = {engine.zero_stage} does nothing on one GPU: it runs as stage 0"
    if not job.fits(own):
        largest = memory.largest_micro(stage)
        at_once, there = memory.micro or job.pairs, job.cluster.memory_bytes / GIB
        what = f"{at_once:,} pairs at once need {own.bytes / GIB:.1f} GiB of {there:.1f}"
        if largest is not None:
            advice = f"engine.micro_batch_size={largest} fits, for one forward pass more"
        elif not job.recipe.model.activation_checkpointing:
            advice = "no micro-batch fits; try model.activation_checkpointing=true"
        else:
            fitting = [str(other) for other in stages(job) if memory.largest_micro(other) is not None]
            advice = f"no micro-batch fits at stage {stage}" + (
                f"; some do at stage {', '.join(fitting)}" if fitting else ""
            )
        yield f"the recipe does not fit: {what}; {advice}"
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
            moved = f"{sent[3] / sent[at]:.2f} times the bytes in many more collectives"
            told = "stage 3 buys nothing" if sent[3] >= sent[at] else "stage 3 is not needed for memory"
            yield f"{told}: stage {at} fits too ({more:+.1f} GiB), and stage 3 moves {moved}"


def _rates(job: Job) -> Iterator[str]:
    cores = job.cluster.cores_per_gpu
    needed = job.fastest_images_per_s / job.world_size / job.cluster.images_per_core
    if cores is not None and needed > cores and job.recipe.decode.backend != "dali":
        yield (
            f"the loader is too slow on CPUs: {needed:.1f} cores per GPU are needed, {cores:g} are there; "
            "decode.backend=dali decodes on the GPU (not measured)"
        )
    workers = job.recipe.data.workers
    if needed > workers and job.recipe.decode.backend == "cpu":
        yield f"data.workers = {workers} threads per process decode on one core each; {needed:.1f} are needed"
    read = job.fastest_images_per_s * job.image_bytes
    if job.cluster.storage_given and read > job.cluster.storage_bytes_per_s:
        yield (
            f"reading is too slow: {read / 1e9:.1f} GB/s are needed, storage gives "
            f"{job.cluster.storage_bytes_per_s / 1e9:g} (--storage-gb-per-s)"
        )
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
            f"a checkpoint takes {write:.0f} s to write, one is due every {every:.0f} s: some would be left out; "
            "raise run.checkpoint_every"
        )
    if stall > STALL_SHARE * every:
        yield f"checkpoints hold training up for {stall / every:.1%} of its time; raise run.checkpoint_every"
    lost = every / 2 * job.world_size / 3600
    if every > 3600:
        yield (
            f"a checkpoint every {every / 3600:.1f} hours: a fault loses {lost:,.0f} GPU hours on average; lower "
            "run.checkpoint_every (tools/scaling.py --simulate finds the best interval)"
        )
