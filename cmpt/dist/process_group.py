"""The process group and the few collectives that cmpt itself needs."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.dist import traffic


T = TypeVar("T")
_BEAT_S = 30.0
_LAST_WORK_S = 0.2


def start(timeout_minutes: float = 10) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes, or make one of a single process: (rank, world, device).

    Understands what `deepspeed`, `torchrun` and mpirun-like launchers set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT); with none of it set, this process is the whole world and no port is opened.
    Tensors on the host go through gloo, tensors on CUDA through NCCL.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def stop() -> None:
    """Also gives gloo's threads time to free the tensors of their last work, for which they need the GIL: one that asks for
    it when the interpreter has begun to end is taken to be what was seen to abort finished processes, rarely."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_LAST_WORK_S)


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over ranks of a host tensor (integers stay exact at any world size)."""
    total = counts.clone()
    if _world_size() > 1:
        with traffic.collective("control", traffic.ring_bytes(total.nbytes, dist.get_world_size(), passes=2)):
            dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """One object of every rank, in rank order, on every rank. For small things, off the step's path."""
    if _world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with traffic.collective("control", len(pickle.dumps(value)) * (len(values) - 1)):
        dist.all_gather_object(values, value, group=_host_group())
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's object, on every rank."""
    if _world_size() == 1:
        return value
    holder = [value]
    with traffic.collective("control", 0):
        dist.broadcast_object_list(holder, src=0, group=_host_group())
    traffic.add("control", traffic.ring_bytes(len(pickle.dumps(holder[0])), dist.get_world_size()))
    return holder[0]


def on_first_rank(work: Callable[[], T], beat: Callable[[], None]) -> T:
    """What `work` of rank 0 returns, on every rank, however long it takes: longer than a collective may wait, too.

    Every rank calls `beat` about twice a minute meanwhile. What `work` raises is raised on every rank.
    """
    if _world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if dist.get_rank() == 0 else None
        while True:
            outcome: tuple[T | None, BaseException | None] | None = None
            if future is not None and wait([future], timeout=_BEAT_S).done:
                fault = future.exception()
                outcome = (None if fault else future.result(), fault)
            outcome = broadcast_object(outcome)
            beat()
            if outcome is not None:
                result, fault = outcome
                if fault is not None:
                    raise fault
                return result  # type: ignore[return-value]


def barrier() -> None:
    if _world_size() > 1:
        with traffic.collective("control", 0):
            dist.barrier(group=_host_group())


_host: list[Any] = []


def _host_group() -> Any:
    """A gloo group for Python objects, made on first use; on a CPU it is the default group."""
    if not torch.cuda.is_available():
        return None
    if not _host:
        _host.append(dist.new_group(backend="gloo"))
    return _host[0]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# torch 2.13 renamed these two; 2.11 and 2.12 know the old names only.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BE: Tensor) -> Tensor:
        world = dist.get_world_size()
        gathered_GE = local_BE.new_empty(world * local_BE.shape[0], *local_BE.shape[1:])
        with traffic.collective("features", traffic.ring_bytes(gathered_GE.nbytes, world)):
            all_gather_into(gathered_GE, local_BE.contiguous())
        return gathered_GE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_GE,) = grads
        world, rank = dist.get_world_size(), dist.get_rank()
        if grad_GE.is_cuda:
            grad_BE = grad_GE.new_empty(grad_GE.shape[0] // world, *grad_GE.shape[1:])
            with traffic.collective("features", traffic.ring_bytes(grad_GE.nbytes, world)):
                reduce_scatter_into(grad_BE, grad_GE.contiguous())
            return grad_BE
        total = grad_GE.contiguous().clone()  # gloo has no reduce-scatter on every build
        with traffic.collective("features", traffic.ring_bytes(total.nbytes, world, passes=2)):
            dist.all_reduce(total)
        return total.chunk(world)[rank]


def gather_with_gradient(local_BE: Tensor) -> Tensor:
    """[B, ...] of every rank -> [G, ...] on every rank, in rank order; the gradient is summed back to its owner.

    All ranks hold the same number of rows. With a local loss over the gathered columns and *mean* reduction of the
    parameters' gradients over ranks, the result is the gradient of the global mean loss, temperature included.
    """
    return local_BE if _world_size() == 1 else _AllGather.apply(local_BE)
