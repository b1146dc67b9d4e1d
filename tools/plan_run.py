"""What a recipe means on so many GPUs: tokens, FLOPs, steps, time by term, bytes, data and checkpoints."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from cmpt.engine.build import COMPUTE_DTYPES, by_layer, deepspeed_config
from cmpt.engine.dry_run import LargestBatch, largest_batch
from cmpt.engine.plan import Plan, PlannedPhase
from cmpt.engine.traffic import recipe_bytes
from cmpt.masking.fixed import kept_of
from cmpt.masking.strategies import masking_at, most_kept
from cmpt.models.flops import forward_flops, training_flops
from cmpt.recipe import ResolvedPhase, parse_duration, phases
from cmpt.recipe.paths import expand_shards
from cmpt.recipe.schema import Engine, Recipe
from gpus import Gpu
from plan_memory import FP32, INPUTS, PATCHES, STAGE_0_BUCKET, Largest, Peak, Sharding
from step_model import Link, Machine, Work, step_terms

LOADER_IMAGES_PER_CORE = 300.0
"""Measured: bench_loader.py, 512 x 384 JPEG, CPU backend, one core of an Intel Xeon (tools/README.md)."""
LATENCY_INSIDE_S, LATENCY_BETWEEN_S = 5e-6, 10e-6
"""Assumed, per round of a collective; tools/bench_collectives.py measures them."""
ADAMW_BYTES = 7 * FP32
"""Per element: AdamW reads weight, gradient and two moments and writes all but the gradient."""
OFFLOAD_BYTES = {1: 2 * FP32, 2: 2 * FP32, 3: 4 * FP32}
"""Per element, by stage: an optimizer on the host gets the gradient and gives the weight back. At stage 3 the gradient
goes up again for its norm, and back."""
FEATURE_CALLS, CONTROL_CALLS = 2, 2
"""Of a step, whatever the stage: the gather of embeddings and of its gradient; the sum of counts (engine/counts.py, on
GPUs through gloo) and that of the loss and the norms (engine/sharded.py)."""


@dataclass(frozen=True)
class KnownLink:
    """A link, and where its figures come from."""

    link: Link
    bandwidth_source: str
    latency_source: str


@dataclass(frozen=True)
class Cluster:
    """What the user has, and what of it was assumed."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    mfu: float
    mfu_source: str
    mfu_given: bool
    inside: KnownLink
    between: KnownLink
    memory_bytes: float
    """Of a GPU that training may use: all of it but the reserve."""
    reserve_bytes: float = 0.0
    memory_given: bool = False
    """Else it is the card's."""
    images_per_core: float = LOADER_IMAGES_PER_CORE
    cores_per_gpu: float | None = None
    """Of the node; None: not known."""
    storage_bytes_per_s: float = 2e9
    host_memory_bytes_per_s: float = 300e9
    """Of a node, read and written together; what its GPUs share where the optimizer is offloaded."""
    fit_device: str | None = None
    """What the study of --fit ran on."""
    price_per_gpu_hour: float | None = None
    assumed: frozenset[str] = frozenset()
    """Options that were not given, so that their values are assumptions."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def how(self, option: str) -> str:
        """How the value of an option came about."""
        return f"assumed; {option}" if option in self.assumed else f"given with {option}"

    def machine(self, engine: Engine) -> Machine:
        """Nothing of a collective is hidden by compute, nor of an offloaded optimizer."""
        per_element = ADAMW_BYTES / self.gpu.memory_bytes_per_s
        if engine.offload_optimizer:
            of_gpu = self.host_memory_bytes_per_s / self.gpus_per_node
            per_element = OFFLOAD_BYTES[engine.zero_stage] / self.gpu.host_bytes_per_s + ADAMW_BYTES / of_gpu
        return Machine(
            flops_per_s=self.gpu.peak_flops(engine.precision) * self.mfu,
            loss_flops_per_s=self.gpu.peak_fp32_flops * self.mfu,
            optimizer_elements_per_s=1 / per_element,
            inside=self.inside.link,
            between=self.between.link,
        )


@dataclass(frozen=True)
class PhasePlan:
    planned: PlannedPhase
    patches: int
    """Of a whole image."""
    kept: float
    """Patches per image that the tower sees, on average."""
    words: float
    """Tokens per caption, on average."""
    forward_flops: float
    """Per pair."""
    flops: float
    """Per pair, of training, with what is recomputed and the loss."""
    terms: Mapping[str, float]
    """Seconds of a step."""

    @property
    def steps(self) -> int:
        return self.planned.last_step - self.planned.first_step

    @property
    def step_s(self) -> float:
        return sum(self.terms.values())

    @property
    def images_per_s(self) -> float:
        return self.planned.batch_size / self.step_s

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


@dataclass
class Job:
    """A recipe on a cluster. `machine`: how fast it is, where that is known better than from data sheets."""

    recipe: Recipe
    cluster: Cluster
    caption_tokens: float
    image_bytes: float
    """Of an encoded image, on average."""
    samples_per_epoch: int
    machine: Machine

    def __post_init__(self) -> None:
        self.phases = phases(self.recipe)
        self.plan = Plan(self.recipe, self.samples_per_epoch)

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def pairs(self) -> int:
        """Of a rank; where the ranks do not divide the batch, of the rank with the most."""
        return -(-self.recipe.engine.batch_size // self.world_size)

    @cached_property
    def largest_batch(self) -> LargestBatch:
        """What the dry run before the first step tries; no step has more tokens."""
        return largest_batch(self.recipe, self.phases, self.pairs)

    @cached_property
    def largest(self) -> Largest:
        recipe, batch = self.recipe, self.largest_batch
        return Largest(
            recipe.model,
            recipe.loss,
            recipe.image.size,
            batch.grid,
            COMPUTE_DTYPES[recipe.engine.precision],
            True,
            lambda pairs: [batch.kept] * pairs,
            lambda pairs: [batch.words] * pairs,
            self.pairs,
            by_layer(recipe.optimizer),
        )

    @cached_property
    def sizes(self) -> list[list[int]]:
        return [list(group.values()) for group in self.largest.groups]

    @property
    def parameters(self) -> dict[str, int]:
        """By tower."""
        found: dict[str, int] = {}
        for group in self.largest.groups:
            for name, size in group.items():
                tower = name.split(".")[0] if "." in name else "temperature"
                found[tower] = found.get(tower, 0) + size
        return found

    @property
    def elements(self) -> int:
        return sum(self.parameters.values())

    def engine(self, stage: int) -> Engine:
        offload = self.recipe.engine.offload_optimizer and stage > 0
        return replace(self.recipe.engine, zero_stage=stage, offload_optimizer=offload)

    @property
    def zero(self) -> Mapping[str, Any]:
        """What DeepSpeed is told of ZeRO."""
        config = deepspeed_config(self.recipe.engine, self.world_size, self.elements)
        told: Mapping[str, Any] = config["zero_optimization"]
        return told

    def stage(self) -> int:
        """That the recipe's runs as: one process alone has stage 0."""
        return int(self.zero["stage"])

    def sharding(self, stage: int) -> Sharding:
        averaged = self.recipe.optimizer.ema_decay is not None
        return Sharding(self.largest.groups, self.engine(stage), self.world_size, averaged, touched=False)

    def memory(self, stage: int, micro: int | None) -> Peak:
        """Of a GPU at another stage and micro-batch; of the largest batch."""
        return self.largest.peak(self.sharding(stage), self.pairs, micro, self.inputs())

    def fits(self, peak: Peak) -> bool:
        return peak.bytes <= self.cluster.memory_bytes

    def most_at_once(self, stage: int) -> int | None:
        """The most pairs at once that fit; None: not even one does.

        A batch goes in equal parts (engine/step.py), so a micro-batch stands for the pairs of a part: the fewest parts
        that fit are looked for.
        """
        if self.fits(self.memory(stage, None)):
            return self.pairs

        def at_once(parts: int) -> int:
            return -(-self.pairs // parts)

        counts = range(2, self.pairs + 1)
        found = bisect_left(counts, True, key=lambda parts: self.fits(self.memory(stage, at_once(parts))))
        return at_once(counts[found]) if found < len(counts) else None

    def micro_batches(self) -> list[int | None]:
        """None and its halvings."""
        found: list[int | None] = [None]
        half = self.pairs
        while half > 1:
            half = -(-half // 2)
            found.append(half)
        return found

    def inputs(self) -> dict[str, float]:
        """Of the dry run: a batch as fp32 patches, and pixels and patches of the one that is masked beside it."""
        batch, values = self.largest_batch, 3 * (self.recipe.model.patch_size or 1) ** 2
        kept = batch.pairs * batch.kept * values
        ahead = batch.pairs * batch.grid[0] * batch.grid[1] * values
        ahead += kept * torch.empty(0, dtype=COMPUTE_DTYPES[self.recipe.engine.precision]).element_size()
        return {PATCHES: FP32 * kept, INPUTS: ahead}

    def sent_bytes(self, stage: int, world_size: int | None = None) -> dict[str, int]:
        """By kind, that one rank sends in a step."""
        world = world_size or self.world_size
        return recipe_bytes(self.recipe, self.sizes, world, self.recipe.engine.batch_size, zero_stage=stage)

    def calls(self, stage: int) -> dict[str, float]:
        """Collectives of a step, by kind."""
        micro = self.recipe.engine.micro_batch_size
        parts = -(-self.pairs // micro) if self.cached and micro else 1
        return {"features": FEATURE_CALLS, "control": CONTROL_CALLS, **zero_calls(self.sharding(stage), parts)}

    @cached_property
    def cached(self) -> bool:
        micro = self.recipe.engine.micro_batch_size
        return micro is not None and micro < self.pairs

    @cached_property
    def phase_plans(self) -> list[PhasePlan]:
        return [self.phase_plan(planned) for planned in self.plan.phases]

    def phase_plan(self, planned: PlannedPhase) -> PhasePlan:
        recipe, stage, phase = self.recipe, self.stage(), planned.phase
        side = phase.image.size // (recipe.model.patch_size or 1)
        kept, words = mean_kept(phase, side), self.words(phase)
        rows = recipe.engine.batch_size / self.world_size
        # FLOPs of attention are those of equal lengths at the mean; of spread ones they are a little more.
        image_lengths, text_lengths = [round(kept)], [round(words)]
        forward = forward_flops(recipe.model, image_lengths, text_lengths)
        towers = training_flops(recipe.model, image_lengths, text_lengths, 0, self.cached)
        flops = training_flops(recipe.model, image_lengths, text_lengths, recipe.engine.batch_size, self.cached)
        work = Work(
            world_size=self.world_size,
            ranks_per_node=self.cluster.gpus_per_node,
            samples=rows,
            tower_flops=towers * rows,
            loss_flops=(flops - towers) * rows,
            stepped_elements=self.elements / (self.world_size if stage else 1),
            sent_bytes=self.sent_bytes(stage),
            calls=self.calls(stage),
        )
        terms = step_terms(work, self.machine)
        return PhasePlan(planned, side * side, kept, words, forward, flops, terms)

    def words(self, phase: ResolvedPhase) -> float:
        return min(self.caption_tokens, self.recipe.model.context_length, phase.text_masking.tokens or 10**9)

    @property
    def hours(self) -> float:
        return sum(phase.hours for phase in self.phase_plans)

    @property
    def steps(self) -> int:
        return self.plan.total_steps

    @property
    def fastest_images_per_s(self) -> float:
        """Of the phase that needs most data."""
        return max(phase.images_per_s for phase in self.phase_plans)

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights, two moments, and the average where one is kept."""
        return FP32 * self.elements * (3 + (self.recipe.optimizer.ema_decay is not None))

    @property
    def checkpoint_steps(self) -> int:
        every = parse_duration(self.recipe.run.checkpoint_every)
        return min(self.steps, every.steps(self.samples_per_epoch, self.recipe.engine.batch_size))

    @property
    def divides(self) -> bool:
        """Every GPU has as many of the streams; else the run does not start (cmpt.recipe.check_recipe)."""
        return self.recipe.data.streams % self.world_size == 0

    @property
    def read_bytes_per_s(self) -> float:
        """Of all nodes together."""
        return self.fastest_images_per_s * self.image_bytes

    @property
    def cores_needed(self) -> float:
        """Per GPU, where the CPU decodes."""
        return self.fastest_images_per_s / self.world_size / self.cluster.images_per_core

    @property
    def cores_used(self) -> float:
        """Per GPU: by the threads of its process, as far as the node has cores for them."""
        return min(self.recipe.data.workers, self.cluster.cores_per_gpu or math.inf)

    @property
    def decodes_too_slowly(self) -> bool:
        """Where the CPU decodes: with decode.backend "cpu", and with "auto" on nodes without DALI."""
        return self.recipe.decode.backend != "dali" and self.cores_needed > self.cores_used

    @cached_property
    def shards(self) -> int | None:
        """How many the recipe names; None where wildcards match nothing here."""
        counts = [len(expand_shards(url)) for source in self.recipe.data.train for url in source.urls]
        return sum(counts) if counts and all(counts) else None


def zero_calls(sharding: Sharding, parts: int) -> dict[str, float]:
    """Collectives of DeepSpeed 0.19.8 in a steady step; `parts`: of gradient caching, 1 is off.

    Stage 3 sums a norm for each parameter group; it gathers small parameters one by one after the step, the others a
    prefetch bucket at a time. With gradient caching it does so twice for each part, and fetches every parameter by
    itself in the backward pass.
    """
    groups, elements, stage = len(sharding.groups), sharding.elements, sharding.stage
    if stage == 0:
        return {"gradients": math.ceil(elements / STAGE_0_BUCKET), "parameters": 0}
    buckets = math.ceil(elements / sharding.limit)
    if stage < 3:
        return {"gradients": buckets, "parameters": groups}
    kept = sharding.zero["stage3_param_persistence_threshold"]
    sizes = [size for group in sharding.groups for size in group.values()]
    large = [size for size in sizes if size > kept]
    fetches = math.ceil(sum(large) / max(1, sharding.zero["stage3_prefetch_bucket_size"]))
    fetches = fetches if parts == 1 else parts * (2 * fetches + len(large))
    return {"gradients": buckets + groups, "parameters": len(sizes) - len(large) + fetches}


def mean_kept(phase: ResolvedPhase, side: int) -> float:
    """Patches per image that a phase keeps on average: what the recipe aims at."""
    masking, patches = phase.masking, side * side
    if masking.strategy in ("none", "grid"):
        return most_kept(masking, (side, side))
    ends = [masking_at(masking, progress).ratio for progress in (0.0, 1.0)]
    if masking.strategy == "cluster":
        return patches * (1 - sum(ends) / 2)
    return sum(kept_of(patches, ratio) for ratio in ends) / 2


def nearest_counts(streams: int, wanted: int, gpus_per_node: int) -> Sequence[int]:
    """World sizes of whole nodes that divide the streams: the next ones below and above the wanted one."""
    fitting = [size for size in range(gpus_per_node, streams + 1, gpus_per_node) if streams % size == 0]
    below, above = [size for size in fitting if size < wanted], [size for size in fitting if size > wanted]
    return [*below[-1:], *above[:1]]
