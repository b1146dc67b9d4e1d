"""Do all ranks compute with the same weights? What should be alike is compared by checksum, tensor by tensor."""

from __future__ import annotations

import socket
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.dist.process_group import gather_objects
from cmpt.engine import sharded
from cmpt.engine.build import Trained


def unequal_weights(trained: Trained) -> str | None:
    """Which rank holds other weights than the rest, and where; None if all are alike. Collective, the same answer
    on every rank. One flipped bit is enough; with one rank there is nothing to compare.

    Between ranks, all parameters are compared at ZeRO stages 0 to 2, with their average at stage 0, and at stage 3
    those that every rank holds whole. Of two ranks that differ nobody can tell which one is right; of more, the
    majority decides. Above stage 0, a rank's master weights are also compared with what it computes with.

    Call it before the optimizer step. At stage 0 a flip stays, and is found whenever one looks. Above, every step
    overwrites what the ranks compute with by the masters: a flip there spoils one gradient and heals, a flip in a
    master goes to all ranks alike, and after the step neither is to be seen.
    """
    if dist.get_world_size() == 1:
        return None
    return _between_ranks(_held_alike(trained)) or _masters(trained)


def checksum(tensor: Tensor) -> Tensor:
    """The sum of the bit patterns of an fp32 tensor, modulo 2^64; int64 []."""
    return tensor.contiguous().view(torch.int32).sum(dtype=torch.int64)


def _held_alike(trained: Trained) -> dict[str, Tensor]:
    """What every rank holds whole, by name."""
    parameters = dict(trained.clip.named_parameters())
    held = {name: p.detach() for name, p in parameters.items() if p.numel() == getattr(p, "ds_numel", p.numel())}
    if trained.average is not None and trained.engine.zero_optimization_stage() == 0:
        held |= {f"the average of {name}": flat for name, flat in zip(parameters, trained.average.flats, strict=True)}
    return held


def _between_ranks(held: dict[str, Tensor]) -> str | None:
    if not held:
        return None
    sums = torch.stack([checksum(value) for value in held.values()]).cpu()
    highest, lowest = sums.clone(), sums.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    differing = (highest != lowest).nonzero()[:, 0].tolist()
    if not differing:
        return None
    first, names = differing[0], list(held)
    found = gather_objects((socket.gethostname(), int(sums[first])))
    common, votes = Counter(value for _, value in found).most_common(1)[0]
    ranks = [rank for rank, (_, value) in enumerate(found) if 2 * votes <= len(found) or value != common]
    who = ", ".join(f"rank {rank} on {found[rank][0]}" for rank in ranks[:4])
    who += f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    verb = "differ" if len(ranks) > 1 else "differs"
    against = " from the rest" if len(ranks) < len(found) else ""
    others = f" and {len(differing) - 1} more of {len(held)} tensors" if len(differing) > 1 else ""
    return f"{who} {verb}{against} in {names[first]}{others}"


def _masters(trained: Trained) -> str | None:
    """Which rank steps other weights than it computes with: above stage 0 it holds both, as fp32."""
    stage = trained.engine.zero_optimization_stage()
    if stage == 0:
        return None
    flats = [flat.detach() for flat in sharded.flat_parameters(trained.engine)]
    parameters = dict(trained.clip.named_parameters())
    unlike = None
    for piece in sharded.pieces(trained.engine):
        parameter, start = parameters[piece.name], piece.start
        if stage == 3:
            parameter, start = parameter.ds_tensor, 0  # type: ignore[attr-defined]  # this rank's piece alone
        computed = parameter.detach().view(-1)[start : start + piece.numel]
        stepped = piece.of(flats).to(computed.device)
        if not torch.equal(stepped.view(torch.int32), computed.view(torch.int32)):
            unlike = piece.name
            break
    for rank, (host, name) in enumerate(gather_objects((socket.gethostname(), unlike))):
        if name is not None:
            return f"rank {rank} on {host} differs from its own master weights in {name}"
    return None
