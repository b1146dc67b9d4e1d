"""Do all ranks compute with the same weights? What should be alike is compared by checksum, tensor by tensor."""

from __future__ import annotations

import socket
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.dist.process_group import gather_objects
from cmpt.engine.build import Trained


def unequal_weights(trained: Trained) -> str | None:
    """Which rank holds other weights than the rest, and where; None if all are alike. Collective, the same answer
    on every rank.

    Checked are all parameters at ZeRO stages 0 to 2 and, at stage 3, those that every rank holds whole. One flipped bit
    changes a checksum. Of two ranks that differ nobody can tell which one is right; of more, the majority decides.
    """
    if dist.get_world_size() == 1:
        return None
    whole = {
        name: p.detach()
        for name, p in trained.clip.named_parameters()
        if p.numel() == getattr(p, "ds_numel", p.numel())
    }
    if not whole:
        return None
    sums = torch.stack([checksum(value) for value in whole.values()]).cpu()
    highest, lowest = sums.clone(), sums.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    differing = (highest != lowest).nonzero()[:, 0].tolist()
    if not differing:
        return None
    first, names = differing[0], list(whole)
    found = gather_objects((socket.gethostname(), int(sums[first])))
    common, votes = Counter(value for _, value in found).most_common(1)[0]
    if 2 * votes > len(found):
        odd = [f"rank {rank} on {host}" for rank, (host, value) in enumerate(found) if value != common]
        who = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "") + " differs from the rest"
    else:
        who = ", ".join(f"rank {rank} on {host}" for rank, (host, _) in enumerate(found[:4])) + " differ"
    more = f" and {len(differing) - 1} other tensors" if len(differing) > 1 else ""
    return f"{who} in {names[first]}{more}"


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the bit patterns of an fp32 tensor, modulo 2^64; int64 []."""
    return tensor.contiguous().view(torch.int32).sum(dtype=torch.int64)
