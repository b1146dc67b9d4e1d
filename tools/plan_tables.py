"""The tables of plan.py: every figure with how it came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpus import GIB
from plan_memory import Peak
from plan_run import ADAMW_BYTES, OFFLOAD_BYTES, Job, KnownLink, PhasePlan
from step_model import TERMS

STAGES = (0, 1, 2, 3)


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        rows = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, "-" * len(self.title), *lines, *self.notes])

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + "-|" * len(self.header)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines + (["", *self.notes] if self.notes else []))


@dataclass(frozen=True)
class MemoryTable:
    """Peaks by ZeRO stage and micro-batch."""

    job: Job
    peaks: Mapping[tuple[int, int | None], Peak]
    most_at_once: Mapping[int, int | None]
    """By stage: the most pairs at once that fit."""

    @classmethod
    def of(cls, job: Job) -> MemoryTable:
        micros = {*job.micro_batches(), job.recipe.engine.micro_batch_size if job.cached else None}
        peaks = {(stage, micro): job.memory(stage, micro) for stage in stages(job) for micro in micros}
        return cls(job, peaks, {stage: job.most_at_once(stage) for stage in stages(job)})

    @property
    def own(self) -> Peak:
        """Of the recipe as it is."""
        return self.peaks[self.job.stage(), self.micro]

    @property
    def micro(self) -> int | None:
        return self.job.recipe.engine.micro_batch_size if self.job.cached else None


def stages(job: Job) -> Sequence[int]:
    return STAGES if job.world_size > 1 else (job.stage(),)  # alone it is 0, unless something is offloaded


def tables(job: Job, memory: MemoryTable) -> list[Table]:
    return [work(job), *memory_tables(job, memory), time(job), data(job), network(job), checkpoints(job)]


def work(job: Job) -> Table:
    recipe, cluster = job.recipe, job.cluster
    towers = ", ".join(f"{name} {size:,}" for name, size in job.parameters.items())
    rows = [
        [
            "GPUs",
            f"{job.world_size:,}",
            f"{counted(cluster.nodes, 'node')} of {cluster.gpus_per_node} {cluster.gpu.name}",
        ],
        ["parameters", f"{job.elements:,}", f"computed from the model on the meta device: {towers}"],
        ["global batch", f"{recipe.engine.batch_size:,}", f"engine.batch_size; {counted(job.pairs, 'pair')} per GPU"],
    ]
    for phase in job.phase_plans:
        name = phase.planned.phase.name
        masking = phase.planned.phase.masking
        rows += [
            [
                f"{name}: patches",
                f"{phase.kept:.0f} of {phase.patches}",
                f"mean that masking.strategy={masking.strategy} aims at",
            ],
            [
                f"{name}: text tokens",
                f"{phase.words:g}",
                f"mean of captions ({cluster.how('--caption-tokens')}), cut as the recipe says",
            ],
            [
                f"{name}: forward",
                f"{number(phase.forward_flops / 1e9, 2)} GFLOP/pair",
                "computed, cmpt.models.flops.forward_flops",
            ],
            [f"{name}: training", f"{number(phase.flops / 1e9, 2)} GFLOP/pair", _training_how(job)],
            [f"{name}: in all", f"{phase.flops * phase.steps * phase.planned.batch_size:.3g} FLOP", "times its pairs"],
        ]
    total = sum(phase.flops * phase.steps * phase.planned.batch_size for phase in job.phase_plans)
    rows.append(["the run", f"{total:.3g} FLOP", "sum over phases"])
    return Table("Work", ["", "", "how"], rows)


def _training_how(job: Job) -> str:
    more = ["recomputed blocks"] if job.recipe.model.activation_checkpointing else []
    more += ["a forward pass more for gradient caching"] if job.cached else []
    return "computed, training_flops: forward, twice that backward, the loss" + "".join(f", {what}" for what in more)


def memory_tables(job: Job, memory: MemoryTable) -> list[Table]:
    micros, batch = job.micro_batches(), job.largest_batch
    limit = job.cluster.memory_bytes
    rows = []
    for stage in stages(job):
        cells = [
            _gib(memory.peaks[stage, micro].bytes) + ("" if job.fits(memory.peaks[stage, micro]) else " ✗")
            for micro in micros
        ]
        largest = memory.most_at_once[stage]
        rows.append([str(stage), *cells, "none" if largest is None else f"{largest:,}"])
    names = ["all, " + f"{job.pairs:,}" if micro is None else f"{micro:,}" for micro in micros]
    title = "Memory per GPU in GiB, by ZeRO stage and pairs at once (engine.micro_batch_size)"
    card = "what the driver reports for the card (public, not read here)"
    notes = [
        f"Largest batch: {batch}, as the dry run before the first step tries it. ✗: more than {_gib(limit)} GiB, which "
        f"is {'--memory-gib' if job.cluster.memory_given else card}, less {_gib(job.cluster.reserve_bytes)} GiB for "
        f"CUDA's context, NCCL and cuBLAS ({job.cluster.how('--reserve-gib')}).",
        "Computed: parameters, optimizer and buckets by DeepSpeed 0.19.8's arithmetic, activations counted on the meta "
        "device. Tested within 10 % of the resident memory of runs on a CPU; on a GPU not measured.",
    ]
    first = Table(title, ["stage", *names, "largest that fits"], rows, notes)
    columns = [memory.peaks[stage, memory.micro] for stage in stages(job)]
    parts = list(dict.fromkeys(name for peak in columns for name, size in peak.parts.items() if size))
    body = [[name, *(_gib(peak.parts.get(name, 0)) for peak in columns)] for name in parts]
    body += [["in all", *(_gib(peak.bytes) for peak in columns)], ["at its most in", *(peak.when for peak in columns)]]
    if any(peak.host for peak in columns):
        body.append(["host memory, optimizer", *(_gib(sum(peak.host.values())) for peak in columns)])
    at_once = f"{counted(memory.micro or job.pairs, 'pair')} at once"
    second = Table(f"Memory by part, {at_once}", ["GiB", *(f"stage {stage}" for stage in stages(job))], body)
    return [first, second]


def time(job: Job) -> Table:
    plans, cluster = job.phase_plans, job.cluster
    engine, gpu = job.recipe.engine, cluster.gpu
    peak = f"{gpu.peak_flops(engine.precision) / 1e12:g} TFLOP/s {engine.precision}"
    hours, price = job.hours * job.world_size, cluster.price_per_gpu_hour
    hows = {
        "compute": f"tower FLOPs of a GPU / ({peak} (data sheet) x MFU {cluster.mfu:.3g})",
        "loss": f"FLOPs of a GPU's rows of logits / ({gpu.peak_fp32_flops / 1e12:g} TFLOP/s fp32 (data sheet) x MFU)",
        "optimizer": f"stepped elements x {ADAMW_BYTES} bytes / {gpu.memory_bytes_per_s / 1e12:g} TB/s (data sheet)",
        "features": "bytes below / link, and latency; nothing is taken as hidden by compute",
        "stragglers": "not in the plan: a fitted machine has them",
        "data": "none, if the loader keeps up (below)",
    }
    if engine.offload_optimizer:
        pcie, memory = gpu.host_bytes_per_s / 1e9, cluster.host_memory_bytes_per_s / 1e9
        moved = OFFLOAD_BYTES[engine.zero_stage]
        hows["optimizer"] = (
            f"on the host: stepped elements x ({moved} bytes / PCIe's {pcie:g} GB/s (data sheet; assumed "
            f"reached) + {ADAMW_BYTES} bytes (a fused AdamW) / a GPU's share of {memory:g} GB/s of host memory "
            f"({cluster.how('--host-memory-gb-per-s')}))"
        )
    rows: list[list[str]] = []

    def each(title: str, show: Callable[[PhasePlan], str], how: str) -> None:
        rows.append([title, *(show(phase) for phase in plans), how])

    for term in TERMS:
        each(term, lambda p, term=term: duration(p.terms[term]), hows.get(term, "as features"))  # type: ignore[misc]
    each("step", lambda p: duration(p.step_s), "sum of these")
    each("images/s", lambda p: number(p.images_per_s), "global batch / step")
    each("images/s and GPU", lambda p: number(p.images_per_s / job.world_size), "")
    each("steps", lambda p: f"{p.steps:,}", "duration / global batch, rounded up")
    whole = f"{number(job.hours, 1)} in all; evaluations, checkpoints and restarts are extra"
    each("hours", lambda p: number(p.hours, 1), whole)
    each("GPU hours", lambda p: number(p.hours * job.world_size), f"{number(hours)} in all")
    if price is not None:
        whole = f"at {price:g} per GPU hour (given with --price-per-gpu-hour); {number(hours * price)} in all"
        each("cost", lambda p: number(p.hours * job.world_size * price), whole)
    links = f"Link inside of a node: {_link(cluster.inside, 1e9, 'GB/s per GPU')}."
    if cluster.nodes > 1:
        links += f" Between nodes: {_link(cluster.between, 1e9 / 8, 'Gbit/s per node')}."
    notes = [f"MFU: {cluster.mfu_source}.", *([links] if job.world_size > 1 else [])]
    return Table("Time of a step, and of the run", ["", *(p.planned.phase.name for p in plans), "how"], rows, notes)


def _link(known: KnownLink, unit_bytes: float, unit: str) -> str:
    bandwidth = f"{number(known.link.bytes_per_s / unit_bytes)} {unit} ({known.bandwidth_source})"
    return f"{bandwidth}, {1e6 * known.link.latency_s:.3g} µs per round of a collective ({known.latency_source})"


def data(job: Job) -> Table:
    cluster, rate, backend = job.cluster, job.fastest_images_per_s, job.recipe.decode.backend
    per_core = cluster.how("--images-per-core")
    if "--images-per-core" in cluster.assumed:
        per_core = "measured, bench_loader.py: 512 x 384 JPEG, CPU backend, a core of an Intel Xeon"
    of_dali = {
        "auto": "none where NVIDIA DALI is installed (decode.backend=auto): there the GPU decodes; not measured",
        "dali": "none with decode.backend=dali: the GPU decodes; not measured",
        "cpu": "with decode.backend=dali the GPU decodes; not measured",
    }
    rows = [
        ["images/s per GPU", number(rate / job.world_size), "of the fastest phase"],
        ["images/s per node", number(rate / cluster.nodes), ""],
        [
            "read per node",
            f"{number(job.read_bytes_per_s / cluster.nodes / 1e9, 2)} GB/s",
            f"{job.image_bytes / 1e3:g} kB per image ({cluster.how('--image-kb')})",
        ],
        ["read in all", f"{number(job.read_bytes_per_s / 1e9, 2)} GB/s", ""],
        [
            "cores per GPU, to decode on the CPU",
            number(job.cores_needed, 1),
            f"{cluster.images_per_core:g} images/s and core ({per_core}); {of_dali[backend]}",
        ],
        ["cores per node", number(job.cores_needed * cluster.gpus_per_node), "the same of all its GPUs"],
    ]
    return Table("Data", ["", "", "how"], rows)


def network(job: Job) -> Table:
    kinds = list(job.sent_bytes(job.stage()))
    rows = []
    for stage in stages(job):
        sent = job.sent_bytes(stage)
        rows.append([str(stage), *(_mib(sent[kind]) for kind in kinds), _mib(sum(sent.values()))])
    notes = [
        "Computed, cmpt.engine.traffic.expected_bytes: fp32, what a GPU sends in the ring count; a test holds it "
        "against counted bytes. The ring passes a node's network once, so as much leaves each node.",
    ]
    return Table("MiB over the network per step and GPU, by ZeRO stage", ["stage", *kinds, "in all"], rows, notes)


def checkpoints(job: Job) -> Table:
    cluster, size = job.cluster, job.checkpoint_bytes
    rows = [
        [
            "size",
            f"{number(size / 1e9, 2)} GB",
            "computed: fp32 weights, two moments" + (", average" if job.recipe.optimizer.ema_decay is not None else ""),
        ],
        ["per GPU", f"{number(size / job.world_size / 1e9, 2)} GB", "each writes its share, at every ZeRO stage"],
        [
            "stall",
            duration(stall_seconds(job)),
            f"copy to the host at PCIe's {cluster.gpu.host_bytes_per_s / 1e9:g} GB/s (data sheet; assumed reached)",
        ],
        [
            "write",
            duration(write_seconds(job)),
            f"beside training, at {cluster.storage_bytes_per_s / 1e9:g} GB/s of storage "
            f"({cluster.how('--storage-gb-per-s')})",
        ],
        [
            "interval",
            duration(checkpoint_seconds(job)),
            f"run.checkpoint_every: {counted(job.checkpoint_steps, 'step')} of the first phase",
        ],
    ]
    return Table("Checkpoints", ["", "", "how"], rows)


def stall_seconds(job: Job) -> float:
    return job.checkpoint_bytes / job.world_size / job.cluster.gpu.host_bytes_per_s


def write_seconds(job: Job) -> float:
    return job.checkpoint_bytes / job.cluster.storage_bytes_per_s


def checkpoint_seconds(job: Job) -> float:
    """Between two checkpoints of the first phase."""
    return job.checkpoint_steps * job.phase_plans[0].step_s


def as_json(job: Job, memory: MemoryTable, warnings: Sequence[str]) -> dict[str, Any]:
    return {
        "world_size": job.world_size,
        "parameters": job.parameters,
        "phases": [
            {
                "name": phase.planned.phase.name,
                "steps": phase.steps,
                "kept_patches": phase.kept,
                "text_tokens": phase.words,
                "forward_flops_per_pair": phase.forward_flops,
                "training_flops_per_pair": phase.flops,
                "step_seconds": dict(phase.terms),
                "images_per_s": phase.images_per_s,
                "hours": phase.hours,
            }
            for phase in job.phase_plans
        ],
        "hours": job.hours,
        "gpu_hours": job.hours * job.world_size,
        "cost": None
        if job.cluster.price_per_gpu_hour is None
        else job.hours * job.world_size * job.cluster.price_per_gpu_hour,
        "memory": [
            {
                "zero_stage": stage,
                "micro_batch_size": micro,
                "bytes": peak.bytes,
                "fits": job.fits(peak),
                "when": peak.when,
                "parts": dict(peak.parts),
                "host": dict(peak.host),
            }
            for (stage, micro), peak in memory.peaks.items()
        ],
        "most_pairs_at_once": {str(stage): most for stage, most in memory.most_at_once.items()},
        "memory_limit_bytes": job.cluster.memory_bytes,
        "sent_bytes": {str(stage): job.sent_bytes(stage) for stage in stages(job)},
        "checkpoint_bytes": job.checkpoint_bytes,
        "checkpoint_stall_s": stall_seconds(job),
        "checkpoint_write_s": write_seconds(job),
        "warnings": list(warnings),
    }


def number(value: float, decimals: int = 0) -> str:
    """With so many decimals, or with more for three digits that say something; "0" is nothing at all."""
    if value == 0:
        return "0"
    return f"{value:,.{max(decimals, 2 - math.floor(math.log10(abs(value))))}f}"


def duration(seconds: float) -> str:
    """Three digits of a unit that suits."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= (2 if size > 1 else 1) * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} µs" if seconds else "0"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _column(value: float, decimals: int) -> str:
    """As many decimals in every row; what they do not show is no zero."""
    least = 10.0**-decimals
    return "0" if value == 0 else f"< {least:g}" if value < least / 2 else f"{value:,.{decimals}f}"


def _gib(size: float) -> str:
    return _column(size / GIB, 2)


def _mib(size: float) -> str:
    return _column(size / 2**20, 1)
