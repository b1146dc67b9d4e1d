"""The tables of plan.py: every figure with how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpus import GIB
from plan_memory import Peak
from plan_run import ADAMW_BYTES, LATENCY_BETWEEN_S, LATENCY_INSIDE_S, LOADER_IMAGES_PER_CORE, Job, PhasePlan
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

    @classmethod
    def of(cls, job: Job) -> MemoryTable:
        micros = {*job.micro_batches(), job.recipe.engine.micro_batch_size if job.cached else None}
        return cls(job, {(stage, micro): job.memory(stage, micro) for stage in stages(job) for micro in micros})

    @property
    def own(self) -> Peak:
        """Of the recipe as it is."""
        return self.peaks[self.job.stage(), self.micro]

    @property
    def micro(self) -> int | None:
        return self.job.recipe.engine.micro_batch_size if self.job.cached else None

    def largest_micro(self, stage: int) -> int | None:
        """The most pairs at once that fit; None: not even one."""
        fitting = [
            self.job.pairs if micro is None else micro
            for (at, micro), peak in self.peaks.items()
            if at == stage and self.job.fits(peak)
        ]
        return max(fitting, default=None)


def stages(job: Job) -> Sequence[int]:
    return STAGES if job.world_size > 1 else (job.stage(),)  # alone it is 0, unless something is offloaded


def tables(job: Job, memory: MemoryTable) -> list[Table]:
    return [work(job), *memory_tables(job, memory), time(job), data(job), network(job), checkpoints(job)]


def work(job: Job) -> Table:
    recipe, cluster = job.recipe, job.cluster
    towers = ", ".join(f"{name} {size:,}" for name, size in job.parameters.items())
    rows = [
        ["GPUs", f"{job.world_size:,}", f"{cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu.name}"],
        ["parameters", f"{job.elements:,}", f"computed from the model on the meta device: {towers}"],
        ["global batch", f"{recipe.engine.batch_size:,}", f"engine.batch_size; {job.pairs:,} pairs per GPU"],
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
                "assumed mean of captions (--caption-tokens), cut as the recipe says",
            ],
            [
                f"{name}: forward",
                f"{phase.forward_flops / 1e9:.2f} GFLOP/pair",
                "computed, cmpt.models.flops.forward_flops",
            ],
            [f"{name}: training", f"{phase.flops / 1e9:.2f} GFLOP/pair", _training_how(job)],
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
        largest = memory.largest_micro(stage)
        rows.append([str(stage), *cells, "none" if largest is None else f"{largest:,}"])
    names = ["all, " + f"{job.pairs:,}" if micro is None else f"{micro:,}" for micro in micros]
    title = "Memory per GPU in GiB, by ZeRO stage and pairs at once (engine.micro_batch_size)"
    notes = [
        f"Largest batch: {batch}, as the dry run before the first step tries it. ✗: more than {_gib(limit)} GiB, which "
        "is what the driver reports for the card (public, not read here) less --reserve-gib for CUDA's context, NCCL "
        "and cuBLAS (assumed).",
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
    at_once = f"{memory.micro or job.pairs:,} pairs at once"
    second = Table(f"Memory by part, {at_once}", ["GiB", *(f"stage {stage}" for stage in stages(job))], body)
    return [first, second]


def time(job: Job) -> Table:
    plans, cluster = job.phase_plans, job.cluster
    peak, bandwidth = cluster.gpu.peak_bf16_flops / 1e12, cluster.gpu.memory_bytes_per_s / 1e12
    rows = [[f"{term}, s per step", *(f"{phase.terms[term]:.3f}" for phase in plans), ""] for term in TERMS]
    hows = {
        "compute": f"tower FLOPs of a GPU / ({peak:g} TFLOP/s bf16 (data sheet) x MFU {cluster.mfu:g})",
        "loss": "FLOPs of a GPU's rows of logits / the same",
        "optimizer": f"stepped elements x {ADAMW_BYTES} bytes / {bandwidth:g} TB/s (data sheet)",
        "features": "bytes below / link, and latency; nothing is taken as hidden by compute",
        "stragglers": "not in the plan: a fitted machine has them",
        "data": "none, if the loader keeps up (below)",
    }
    for row, term in zip(rows, TERMS, strict=True):
        row[-1] = hows.get(term, "as features")

    def each(title: str, show: Any, how: str) -> None:
        rows.append([title, *(show(phase) for phase in plans), how])

    each("step, s", lambda p: f"{p.step_s:.3f}", "sum")
    each("images/s", lambda p: f"{p.images_per_s:,.0f}", "global batch / step")
    each("images/s and GPU", lambda p: f"{p.images_per_s / job.world_size:,.0f}", "")
    each("steps", lambda p: f"{p.steps:,}", "duration / global batch, rounded up")
    each(
        "hours",
        lambda p: f"{p.hours:,.1f}",
        f"{job.hours:,.1f} in all; evaluations, checkpoints and restarts are extra",
    )
    hours = job.hours * job.world_size
    each("GPU hours", lambda p: f"{p.hours * job.world_size:,.0f}", f"{hours:,.0f} in all")
    price = cluster.price_per_gpu_hour
    if price is not None:
        each(
            "cost",
            lambda p: f"{_cost(job, p, price):,.0f}",
            f"at {price:g} per GPU hour (given); {hours * price:,.0f} in all",
        )
    notes = [
        f"Latency: {LATENCY_INSIDE_S * 1e6:g} µs per round inside of a node, {LATENCY_BETWEEN_S * 1e6:g} µs between "
        f"nodes, assumed. Links at their data sheet's rate: {cluster.link_bytes_per_s / 1e9:g} GB/s per GPU inside, "
        f"{cluster.network_bytes_per_s * 8 / 1e9:g} Gbit/s per node.",
        "MFU is others' figure or given with --mfu; cmpt's own is not measured on a GPU.",
    ]
    return Table("Time", ["", *(phase.planned.phase.name for phase in plans), "how"], rows, notes)


def _cost(job: Job, phase: PhasePlan, price: float) -> float:
    return phase.hours * job.world_size * price


def data(job: Job) -> Table:
    cluster, rate = job.cluster, job.fastest_images_per_s
    per_gpu, per_node = rate / job.world_size, rate / cluster.nodes
    measured = cluster.images_per_core == LOADER_IMAGES_PER_CORE
    source = "measured, bench_loader.py: 512 x 384 JPEG, CPU backend, a core of an Intel Xeon" if measured else "given"
    rows = [
        ["images/s per GPU", f"{per_gpu:,.0f}", "of the fastest phase"],
        ["images/s per node", f"{per_node:,.0f}", ""],
        [
            "read per node",
            f"{per_node * job.image_bytes / 1e9:.2f} GB/s",
            f"{job.image_bytes / 1e3:g} kB per image (--image-kb, assumed)",
        ],
        ["read in all", f"{rate * job.image_bytes / 1e9:.2f} GB/s", ""],
        [
            "cores per GPU",
            f"{per_gpu / cluster.images_per_core:.1f}",
            f"{cluster.images_per_core:g} images/s and core: {source}",
        ],
        [
            "cores per node",
            f"{per_node / cluster.images_per_core:.0f}",
            "with decode.backend=dali the GPU decodes; not measured",
        ],
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
    share = size / job.world_size
    every_s = checkpoint_seconds(job)
    storage = "given" if cluster.storage_given else "assumed; --storage-gb-per-s"
    rows = [
        [
            "size",
            f"{size / 1e9:.2f} GB",
            "computed: fp32 weights, two moments" + (", average" if job.recipe.optimizer.ema_decay else ""),
        ],
        ["per GPU", f"{share / 1e9:.3f} GB", "each writes its share, at every ZeRO stage"],
        [
            "stall",
            f"{stall_seconds(job):.3f} s",
            f"copy to the host at PCIe's {cluster.gpu.host_bytes_per_s / 1e9:g} GB/s (data sheet; assumed reached)",
        ],
        [
            "write",
            f"{write_seconds(job):.1f} s",
            f"beside training, at {cluster.storage_bytes_per_s / 1e9:g} GB/s of storage ({storage})",
        ],
        ["interval", f"{every_s / 60:.1f} min", f"run.checkpoint_every: {job.checkpoint_steps:,} steps"],
    ]
    return Table("Checkpoints", ["", "", "how"], rows)


def stall_seconds(job: Job) -> float:
    return job.checkpoint_bytes / job.world_size / job.cluster.gpu.host_bytes_per_s


def write_seconds(job: Job) -> float:
    return job.checkpoint_bytes / job.cluster.storage_bytes_per_s


def checkpoint_seconds(job: Job) -> float:
    """Between two checkpoints."""
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
        "memory_limit_bytes": job.cluster.memory_bytes,
        "sent_bytes": {str(stage): job.sent_bytes(stage) for stage in stages(job)},
        "checkpoint_bytes": job.checkpoint_bytes,
        "checkpoint_stall_s": stall_seconds(job),
        "checkpoint_write_s": write_seconds(job),
        "warnings": list(warnings),
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
