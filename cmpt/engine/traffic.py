"""Bytes that DeepSpeed's collectives move: counted as they happen, and as they should be by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor

from cmpt.dist import traffic
from cmpt.dist.step_clock import StepClock, clock
from cmpt.models.clip import CLIP, parameter_groups
from cmpt.recipe.schema import Recipe

# Collective of DeepSpeed's backend -> kind, passes around the ring, the argument whose bytes count, where the process
# group stands. These are all that ZeRO uses, and each calls torch.distributed itself, so that none is counted twice.
_COLLECTIVES: dict[str, tuple[str, int, tuple[str, int], int]] = {
    "all_reduce": ("gradients", 2, ("tensor", 0), 2),
    "all_reduce_coalesced": ("gradients", 2, ("tensors", 0), 2),
    "reduce": ("gradients", 1, ("tensor", 0), 3),
    "reduce_scatter": ("gradients", 1, ("input_list", 1), 3),
    "reduce_scatter_tensor": ("gradients", 1, ("input_tensor", 1), 3),
    "all_to_all_single": ("gradients", 1, ("input", 1), 4),
    "broadcast": ("parameters", 1, ("tensor", 0), 2),
    "all_gather": ("parameters", 1, ("tensor_list", 0), 2),
    "all_gather_into_tensor": ("parameters", 1, ("output_tensor", 0), 2),
    "all_gather_coalesced": ("parameters", 1, ("output_tensors", 0), 2),
}
PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's `stage3_param_persistence_threshold`, where the recipe passes through no other."""
_VALUE_BYTES = 4
"""Parameters and gradients travel as fp32 at every precision of the recipe."""
_SUM_BYTES = 8
"""Of an fp64 sum over ranks."""


def count_deepspeed() -> None:
    """Count DeepSpeed's collectives from now on; call it after `deepspeed.initialize`, as often as one likes.

    Reductions are "gradients", gathers and broadcasts "parameters". A collective counts when it is called, so an
    asynchronous one is in the step that started it; its result is handed through untouched, but where a clock runs
    (dist/step_clock.py), which times the wait for it. DeepSpeed's own communication logger is no use here: it waits for
    the device around every call.
    """
    backend = comm.cdb
    assert backend is not None, "deepspeed.initialize comes first"
    if getattr(backend, "counted_by_cmpt", False):
        return
    for name, how in _COLLECTIVES.items():
        setattr(backend, name, _counted(getattr(backend, name), *how))
    backend.counted_by_cmpt = True


def _counted(
    collective: Callable[..., Any], kind: str, passes: int, sized: tuple[str, int], group_place: int
) -> Callable[..., Any]:
    name, place = sized

    def call(*args: Any, **kwargs: Any) -> Any:
        payload = args[place] if len(args) > place else kwargs[name]
        group = args[group_place] if len(args) > group_place else kwargs.get("group")
        size_bytes = payload.nbytes if isinstance(payload, Tensor) else sum(tensor.nbytes for tensor in payload)
        world_size = max(1, dist.get_world_size(group))  # -1 outside of the group
        with traffic.collective(kind, traffic.ring_bytes(size_bytes, world_size, passes)):
            result = collective(*args, **kwargs)
        running = clock()
        return result if running is None or not hasattr(result, "wait") else _Awaited(result, kind, running)

    return call


class _Awaited:
    """The handle of an asynchronous collective; waiting for it is time that the collective takes."""

    def __init__(self, handle: Any, kind: str, running: StepClock) -> None:
        self._handle, self._kind, self._clock = handle, kind, running

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.waiting(self._kind):
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def parameter_sizes(clip: CLIP, by_layer: bool = False) -> list[list[int]]:
    """Elements of every parameter, by optimizer group; to be called before ZeRO 3 empties the parameters."""
    return [[parameter.numel() for parameter in group.values()] for group in parameter_groups(clip, by_layer).values()]


def expected_bytes(
    sizes: Sequence[Sequence[int]],
    *,
    world_size: int,
    zero_stage: int,
    batch_size: int,
    embed_dim: int,
    loss: str,
    parts: int = 1,
    holes: bool = False,
    nccl: bool = True,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
) -> dict[str, int]:
    """Bytes by kind that one rank sends in one training step, from what the algorithm needs (cmpt/dist/traffic.py).

    sizes: see `parameter_sizes`; batch_size: global batch G; loss: "infonce" or "sigmoid"; parts: of gradient caching,
    1 is off; holes: the batch has pairs that are left out; nccl: False is gloo; persistence_threshold: DeepSpeed's
    `stage3_param_persistence_threshold`. With N elements in all, fp32, and (W-1)/W left out:

    - features: see `cmpt.dist.traffic.feature_bytes`. Gradient caching changes nothing: they are gathered once.
    - gradients, stage 0: all-reduce, 2N. Stages 1 and 2 need a reduce-scatter, N (ZeRO, arXiv 1910.02054, section 7.1);
      DeepSpeed 0.19.8 all-reduces whole buckets at either, 2N, and every rank keeps its part. Stage 3: reduce-scatter,
      N, each parameter padded to a multiple of W, and a norm for each parameter group. Gradient caching changes
      nothing: gradients add up locally and are reduced once.
    - parameters, stages 1 and 2: all-gather of what was stepped, N (section 7.1), each group padded to a multiple of
      2W. Stage 3 needs one all-gather for the forward and one for the backward pass, 2N (section 7.2). DeepSpeed
      gathers parameters of up to `persistence_threshold` elements once, after the step, and keeps them. It gathers the
      others once too, in the forward pass, while `stage3_max_reuse_distance` (10^9 elements) covers both passes, so up
      to 5 * 10^8 elements; of a larger model it gathers a share twice, which is left out here. With gradient caching,
      where a forward pass may have no backward pass, it keeps nothing: three times for each part (features, forward,
      backward), and more where the model is larger than `stage3_prefetch_bucket_size` (5 * 10^7 elements; 3.2 times
      were seen with a bucket of a 12th of the model), for some are fetched ahead in vain.
    - control: one fp64 all-reduce of the loss and of a norm for each parameter group (engine/sharded.py). The training
      loop sums its counts in one more (engine/counts.py, 10 int64, on GPUs through gloo), which is left out here.

    It is the count of a steady step: at stage 3 the first two record the order of the modules and gather more.
    """
    elements = [size for group in sizes for size in group]
    padded = [_padded(size, world_size) for size in elements]
    gradients = sum(padded) if zero_stage == 3 else 2 * sum(elements)
    parameters = 0
    if zero_stage in (1, 2):
        parameters = sum(_padded(sum(group), 2 * world_size) for group in sizes)
    elif zero_stage == 3:
        fetches = parameter_fetches(parts)
        kept = [size <= persistence_threshold for size in elements]
        parameters = sum(size if stays else fetches * size for size, stays in zip(padded, kept, strict=True))
    group_norms = 2 * len(sizes) * _SUM_BYTES if zero_stage == 3 else 0
    return {
        "features": traffic.feature_bytes(batch_size, embed_dim, loss, world_size, holes, nccl),
        "gradients": traffic.ring_bytes(gradients * _VALUE_BYTES + group_norms, world_size),
        "parameters": traffic.ring_bytes(parameters * _VALUE_BYTES, world_size),
        "control": traffic.ring_bytes((1 + len(sizes)) * _SUM_BYTES, world_size, passes=2),
    }


def recipe_bytes(
    recipe: Recipe,
    sizes: Sequence[Sequence[int]],
    world_size: int,
    batch_size: int,
    nccl: bool = True,
    zero_stage: int | None = None,
) -> dict[str, int]:
    """`expected_bytes` of a step of this recipe, at another world size, global batch or ZeRO stage (None: its own)."""
    engine = recipe.engine
    zero = engine.deepspeed.get("zero_optimization", {})
    return expected_bytes(
        sizes,
        world_size=world_size,
        zero_stage=engine.zero_stage if zero_stage is None else zero_stage,
        batch_size=batch_size,
        embed_dim=recipe.model.embed_dim or 0,
        loss=recipe.loss.kind,
        parts=parts_of(recipe, batch_size / world_size),
        nccl=nccl,
        persistence_threshold=zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD),
    )


def parts_of(recipe: Recipe, rows: float) -> int:
    """Of gradient caching, for so many pairs of a rank; 1: it is off."""
    micro = recipe.engine.micro_batch_size
    return 1 if micro is None else math.ceil(max(1, rows) / micro)


def parameter_fetches(parts: int) -> int:
    """How often stage 3 gathers a parameter in a step; see `expected_bytes`."""
    return 1 if parts == 1 else 3 * parts


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
