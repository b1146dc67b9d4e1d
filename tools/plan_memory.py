"""Memory of a rank by part: parameters, optimizer and buckets by arithmetic, activations counted (plan_activations.py).

The arithmetic follows DeepSpeed 0.19.8 as engine/build.py sets it up (its runtime/zero/stage_1_and_2.py, stage3.py and
runtime/engine.py):

    stage 0    all gradients stay; with several ranks they are then flattened into one more tensor
    stage 1    as stage 0 until the backward pass is over; then through a bucket, and flattened once more from there
    stage 2    each gradient goes into a bucket at once; of a full one the rank keeps its part
    stage 3    as stage 2, and parameters are gathered; DeepSpeed keeps what it will use again within
               stage3_max_reuse_distance (10^9) elements, so all of a model of up to 5 * 10^8, at the end of the forward
    gradient caching (engine.micro_batch_size): at every stage all gradients stay until the last part is done

A bucket has `engine.bucket_elements`, or those of the model where they are fewer: on a GPU all of it is taken, on a CPU
what is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from cmpt.engine.build import deepspeed_config
from cmpt.engine.traffic import PERSISTENCE_THRESHOLD
from cmpt.models.clip import parameter_groups
from cmpt.recipe.schema import Engine, Loss, Model
from plan_activations import (
    LOSS,
    Passes,
    added,
    loss_bytes,
    meta_model,
    packed,
    scaled_passes,
    total,
    tower_passes,
)

FP32 = 4
WEIGHTS, MASTERS, MOMENTS, AVERAGE = "weights", "master weights", "moments", "average of weights"
GRADIENTS, BUCKETS, GATHERED, INPUTS = "gradients", "buckets", "gathered weights", "batch"
PATCHES = "patches"
"""Of the inputs: what gradient caching copies once more, part by part."""
_FEWEST = 4
"""Pairs that are counted; for what lies between two counts the line through them is never too low, as a most of several
things that are linear each."""
STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed flattens at a time at stage 0 (engine.py, buffered_allreduce_fallback)."""
_DEFAULTS = {
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
}

Named = Mapping[str, int]
"""Elements by parameter name."""


@dataclass(frozen=True)
class Peak:
    """What a rank holds when it holds most."""

    parts: Mapping[str, float]
    when: str
    host: Mapping[str, float]
    """In host memory beside the device: what an offloaded optimizer keeps there."""

    @property
    def bytes(self) -> float:
        return total(self.parts)


@dataclass(frozen=True)
class Sharding:
    """How the parameters lie on a rank, in bytes."""

    groups: Sequence[Named]
    """Of the optimizer (cmpt.models.clip.parameter_groups)."""
    engine: Engine
    world_size: int
    averaged: bool
    """optimizer.ema_decay is set."""
    touched: bool
    """Of a buffer counts what is written to, as on a CPU; else all of it."""

    @property
    def zero(self) -> Mapping[str, Any]:
        return {**_DEFAULTS, **deepspeed_config(self.engine, self.world_size, self.elements)["zero_optimization"]}

    @property
    def stage(self) -> int:
        """One process alone has stage 0, whatever the recipe says."""
        return int(self.zero["stage"])

    @property
    def limit(self) -> int:
        """Elements of a bucket, at most."""
        return int(self.zero["reduce_bucket_size"])

    @property
    def offloads(self) -> bool:
        return self.engine.offload_optimizer

    @property
    def elements(self) -> int:
        return sum(sum(group.values()) for group in self.groups)

    @property
    def largest(self) -> int:
        return max(max(group.values()) for group in self.groups)

    def shards(self) -> list[int]:
        """Elements of each group that this rank steps."""
        world = self.world_size
        if self.stage == 0:
            return [sum(group.values()) for group in self.groups]
        if self.stage == 3:
            return [sum(-(-size // world) for size in group.values()) for group in self.groups]
        return [2 * -(-sum(group.values()) // (2 * world)) for group in self.groups]

    def standing(self) -> tuple[dict[str, float], dict[str, float]]:
        """What is there all the time, on the device and on the host."""
        stage, shard = self.stage, FP32 * sum(self.shards())
        device: dict[str, float] = {WEIGHTS: FP32 * self.elements}
        state: dict[str, float] = {MASTERS: 0 if stage == 0 else shard, MOMENTS: 2 * shard}
        if self.averaged:
            state[AVERAGE] = shard
        if stage == 3:
            kept = self.zero["stage3_param_persistence_threshold"]
            device[WEIGHTS] = shard
            device[GATHERED] = FP32 * sum(n for group in self.groups for n in group.values() if n <= kept)
            state[GRADIENTS] = shard
            device[BUCKETS] = FP32 * self.bucket(self.elements)
        if not self.offloads:
            return added(device, state), {}
        if stage < 3:  # gradients pass through one buffer; the host has whole ones of its own too
            device[GRADIENTS] = FP32 * self.largest
            state = added(state, {GRADIENTS: shard + FP32 * self.largest, WEIGHTS: shard})
        else:
            state[GRADIENTS] = 2 * shard
        return device, state

    def bucket(self, written: int) -> int:
        """Elements of a reduction bucket into which so many gradients went."""
        return min(written, self.limit) if self.touched else self.limit

    def buckets(self, written: int) -> int:
        """The same of all of a rank's: there are two where reduction overlaps."""
        return self.bucket(written) * (1 if self.touched or self.stage == 3 or not self.zero["overlap_comm"] else 2)

    def kept_gradients(self) -> int:
        """Elements of the parameters of which this rank steps some: their reduced gradients are kept whole. The most
        of all ranks."""
        kept = [0] * self.world_size
        for group, shard in zip(self.groups, self.shards(), strict=True):
            ends = list(accumulate(group.values()))
            for size, end in zip(group.values(), ends, strict=True):
                for rank in range((end - size) // shard, min(self.world_size - 1, (end - 1) // shard) + 1):
                    kept[rank] += size
        return max(kept)

    def gathered(self, done: int, cached: bool) -> float:
        """Bytes of whole parameters at stage 3 beside the ones that are always there, with so many gradients done."""
        reach = self.ahead if cached else self.zero["stage3_max_reuse_distance"] // 2 + self.ahead
        return FP32 * max(0, min(self.fetched, reach, self.elements - done))

    @property
    def fetched(self) -> int:
        """Elements that stage 3 gathers in a step; smaller parameters are always there."""
        kept = self.zero["stage3_param_persistence_threshold"]
        return sum(n for group in self.groups for n in group.values() if n > kept)

    @property
    def ahead(self) -> int:
        """Elements that stage 3 gathers at a time. They come in one tensor, which stays until the last of them is used
        for the first time, and are copied out of it."""
        return min(self.fetched, self.zero["stage3_prefetch_bucket_size"] + self.largest)


def rank_memory(
    sharding: Sharding, passes: Passes, inputs: Mapping[str, float], loss: Mapping[str, float], cached: bool = False
) -> Peak:
    """The most that a rank holds in a training step, by part.

    passes: of what goes through the towers at once; inputs: of the whole batch of the rank; loss: its most, beside the
    activations, or with gradient caching (`cached`) without them.
    """
    device, host = sharding.standing()
    device = added(device, inputs)
    moments = _step(sharding, passes, loss, cached)
    when, parts = max(((when, added(device, parts)) for when, parts in moments), key=lambda found: total(found[1]))
    return Peak(parts, when, host)


def _step(
    sharding: Sharding, passes: Passes, loss: Mapping[str, float], cached: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """What is there for a while, at the moments of a step that can hold the most."""
    stage, everything = sharding.stage, sharding.elements
    whole = {GATHERED: sharding.gathered(0, cached)} if stage == 3 else {}
    grown = {GRADIENTS: FP32 * everything} if cached else {}
    coming = {GATHERED: FP32 * sharding.ahead} if stage == 3 else {}
    yield "forward pass", added(passes.forward, whole, coming, grown)
    yield "loss", added({} if cached else passes.end, loss, whole)
    at_once = not cached and (stage >= 2 or (stage == 1 and sharding.zero["overlap_comm"]))
    limit = sharding.limit
    done = filled = 0
    for interval in passes.backward:
        held: dict[str, float] = dict(grown)
        if stage == 3:
            held[GATHERED] = sharding.gathered(done, cached)
        elif stage and done and not cached:
            held[BUCKETS] = FP32 * sharding.buckets(filled if at_once else 0)
        if not cached and not at_once:
            held[GRADIENTS] = FP32 * done
        elif at_once and stage < 3 and done > limit:
            held[GRADIENTS] = FP32 * sharding.kept_gradients()
        yield "backward pass", added(interval.peak, held)
        if at_once and filled and filled + interval.elements > limit:  # a full bucket is flattened once more
            yield "reduction in the backward pass", added(interval.live, held, {BUCKETS: FP32 * filled})
            filled = 0
        done, filled = done + interval.elements, filled + interval.elements
    yield from _reduction(sharding, at_once)


def _reduction(sharding: Sharding, at_once: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """After the backward pass: the last reduction, and the optimizer."""
    stage, everything, limit = sharding.stage, sharding.elements, sharding.limit
    largest_shard = max(sharding.shards())
    if stage == 0:
        flat = min(everything, STAGE_0_BUCKET + sharding.largest) if sharding.world_size > 1 else 0
        yield "reduction", {GRADIENTS: FP32 * everything, BUCKETS: FP32 * flat}
        return
    flat, left = min(everything, limit), max(0, everything - limit)
    if stage == 3:
        yield "reduction", {BUCKETS: FP32 * flat, GRADIENTS: 0 if at_once else FP32 * left}
        yield "optimizer", {GRADIENTS: FP32 * largest_shard}
        return
    buffers, kept = FP32 * sharding.buckets(everything), FP32 * sharding.kept_gradients()
    left = 0 if at_once else left
    # On a CPU a gradient that moves into the bucket leaves its own memory as the bucket's is taken.
    waiting = left if sharding.touched else (0 if at_once else everything)
    yield "reduction", {GRADIENTS: FP32 * waiting, BUCKETS: buffers}
    yield "reduction", {GRADIENTS: FP32 * left, BUCKETS: buffers + FP32 * flat}
    if sharding.offloads:
        return
    stays = 0 if stage == 2 else buffers  # at stage 1 the gradients of other ranks' shares stay in the bucket
    yield "optimizer", {GRADIENTS: kept + FP32 * largest_shard, BUCKETS: stays}


@dataclass
class Largest:
    """The memory of a recipe's largest batches, up to `pairs` at once; counted at three numbers of pairs.

    `image_lengths` and `text_lengths` give the kept patches and tokens of so many pairs.
    """

    model: Model
    loss: Loss
    image_size: int
    grid: tuple[int, int]
    dtype: torch.dtype
    flash: bool
    """Attention and LayerNorm of a GPU; else those of a CPU."""
    image_lengths: Callable[[int], Sequence[int]]
    text_lengths: Callable[[int], Sequence[int]]
    pairs: int
    by_layer: bool = False
    """Layers have parameter groups of their own (cmpt.engine.build.by_layer)."""

    def __post_init__(self) -> None:
        self.clip = meta_model(self.model, self.image_size, self.dtype, self.flash)
        groups = parameter_groups(self.clip, self.by_layer).values()
        self.groups = [{name: p.numel() for name, p in group.items()} for group in groups]
        self._counted: dict[int, Passes] = {}
        self._losses: dict[tuple[int, int], float] = {}

    def passes(self, pairs: int) -> Passes:
        """Of so many pairs at once."""
        counts = sorted({_FEWEST, max(_FEWEST, self.pairs // 8), max(_FEWEST, self.pairs)})
        if pairs < _FEWEST or pairs in counts:
            return self._count(pairs)
        high = next((count for count in counts if count > pairs), counts[-1])
        low = counts[counts.index(high) - 1]
        return scaled_passes(self._count(low), self._count(high), (low, high), pairs)

    def _count(self, pairs: int) -> Passes:
        if pairs not in self._counted:
            lengths = self.image_lengths(pairs), self.text_lengths(pairs)
            images, text = packed(self.model, *lengths, self.grid, torch.float32)
            self._counted[pairs] = tower_passes(self.clip, images, text, self.flash)
        return self._counted[pairs]

    def _loss_bytes(self, pairs: int, world_size: int) -> float:
        if (pairs, world_size) not in self._losses:
            self._losses[pairs, world_size] = loss_bytes(self.loss, pairs, self.model.embed_dim or 0, world_size)
        return self._losses[pairs, world_size]

    def peak(self, sharding: Sharding, pairs: int, micro: int | None, inputs: Mapping[str, float]) -> Peak:
        """Of a rank with so many pairs, `micro` of them through the towers at once (None: all)."""
        cached = micro is not None and micro < pairs
        parts = -(-pairs // micro) if cached and micro is not None else 1
        loss = {LOSS: self._loss_bytes(pairs, sharding.world_size)}
        if cached:  # features, and their gradients, of the whole batch; the parts are copies of it
            features = 4.0 * FP32 * pairs * (self.model.embed_dim or 0)
            inputs = added(inputs, {LOSS: features, INPUTS: inputs.get(PATCHES, 0)})
        inputs = {INPUTS: total(inputs) - inputs.get(LOSS, 0), LOSS: inputs.get(LOSS, 0)}
        assert pairs <= self.pairs
        return rank_memory(sharding, self.passes(-(-pairs // parts)), inputs, loss, cached)
