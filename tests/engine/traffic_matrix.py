"""The matrix of test_traffic.py: bytes of a steady training step, counted, seen by torch, and by arithmetic."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from small import BATCH, IMAGE_SIZE, model_of, own_rows, rows_of  # beside this script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmpt.dist import traffic
from cmpt.engine.build import build
from cmpt.engine.step import find_gradient, take_step
from cmpt.engine.traffic import count_deepspeed, expected_bytes, parameter_sizes
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

STEADY_STEP = 2  # ZeRO 3 records the order of the modules before
HOLES = [2, 7]
EVERY = list(itertools.product((None, 2), ("infonce", "sigmoid"), ([],)))
CACHED_OR_NOT = list(itertools.product((None, 2), ("infonce",), ([],)))
WITH_HOLES = list(itertools.product((None,), ("infonce", "sigmoid"), (HOLES,)))
DEFAULT_THRESHOLD = 100_000
# ZeRO stage, DeepSpeed's stage3_param_persistence_threshold (some, no, and all parameters of the model are below it),
# and for these: micro-batch, loss, holes.
CASES = (
    (0, DEFAULT_THRESHOLD, EVERY + WITH_HOLES),
    (1, DEFAULT_THRESHOLD, EVERY),
    (2, DEFAULT_THRESHOLD, EVERY),
    (3, 100, EVERY),
    (3, 0, CACHED_OR_NOT),
    (3, DEFAULT_THRESHOLD, CACHED_OR_NOT),
)
HALF = (  # each stage with and without caching, and with both losses
    (0, DEFAULT_THRESHOLD, None, "infonce", HOLES),
    (0, DEFAULT_THRESHOLD, 2, "sigmoid", []),
    (1, DEFAULT_THRESHOLD, None, "sigmoid", []),
    (1, DEFAULT_THRESHOLD, 2, "infonce", []),
    (2, DEFAULT_THRESHOLD, None, "infonce", []),
    (2, DEFAULT_THRESHOLD, 2, "sigmoid", []),
    (3, 100, None, "sigmoid", []),
    (3, 100, 2, "infonce", []),
    (3, 0, 2, "infonce", []),
    (3, DEFAULT_THRESHOLD, None, "infonce", []),
)
# c10d's operators: what they do, passes around the ring, which argument has the size of the whole.
OPERATORS = {
    "allreduce_": ("reductions", 2, 0),
    "allreduce_coalesced_": ("reductions", 2, 0),
    "reduce_": ("reductions", 1, 0),
    "reduce_scatter_": ("reductions", 1, 1),
    "_reduce_scatter_base_": ("reductions", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reductions", 1, 1),
    "broadcast_": ("gathers", 1, 0),
    "allgather_": ("gathers", 1, 0),
    "_allgather_base_": ("gathers", 1, 0),
    "allgather_coalesced_": ("gathers", 1, 0),
    "allgather_into_tensor_coalesced_": ("gathers", 1, 0),
}


class SeenByTorch(TorchDispatchMode):
    """Adds up what passes torch's dispatcher, whoever called it. An operator that is not known is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "deepspeed"):
            what, passes, place = OPERATORS[func._schema.name.split("::")[1]]
            size = sum(leaf.nbytes for leaf in tree_leaves(args[place]) if isinstance(leaf, torch.Tensor))
            self.sent[what] += passes * size * (dist.get_world_size() - 1) // dist.get_world_size()
        return func(*args, **(kwargs or {}))


def matrix(cases: str) -> dict[str, Any]:
    """By case "counted" and "expected" by kind, and "seen": the bytes of the collectives that reached torch's
    dispatcher in that step, by what they do. `cases` is "all" or "half".
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = own_rows(rank, world)
    found: dict[str, Any] = {}
    every = [(stage, threshold, *how) for stage, threshold, hows in CASES for how in hows]
    for stage, threshold, micro, loss, holes in every if cases == "all" else HALF:
        zero = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}} if stage == 3 else {}
        clip = CLIP(model_of(loss), IMAGE_SIZE, seed=0)
        sizes = parameter_sizes(clip)
        settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage, deepspeed=zero)
        trained = build(clip, settings, Optimizer(), world, torch.device("cpu"))
        count_deepspeed()
        for _ in range(STEADY_STEP + 1):
            patches, text, valid = rows_of(own, holes)
            traffic.take()
            with SeenByTorch() as seen:
                valid_B = valid if holes else None
                result = find_gradient(trained, patches, text, valid_B, Loss(kind=loss, chunk_rows=3), micro)
                take_step(trained, result, 1e-3, None)
        counted = traffic.take()
        expected = expected_bytes(
            sizes,
            world_size=world,
            zero_stage=stage,
            batch_size=BATCH,
            embed_dim=model_of(loss).embed_dim or 0,
            loss=loss,
            parts=1 if micro is None else -(-len(own) // micro),
            holes=bool(holes),
            nccl=False,
            persistence_threshold=threshold,
        )
        name = f"stage={stage} threshold={threshold} micro={micro} {loss} holes={len(holes)}"
        found[name] = {"counted": counted, "expected": expected, "seen": seen.sent}
    return found
