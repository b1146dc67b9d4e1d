"""Bytes that cmpt's own collectives count, against the ring algorithm worked out by hand."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import unused_port

from cmpt.dist import process_group, traffic

ROWS, WIDTH = 6, 10


@pytest.mark.parametrize(("world_size", "sent"), [(1, 0), (2, 600), (4, 900)])
def test_ring_bytes_are_what_one_rank_sends(world_size: int, sent: int) -> None:
    assert traffic.ring_bytes(1200, world_size) == sent
    assert traffic.ring_bytes(1200, world_size, passes=2) == 2 * sent


def test_take_returns_every_kind_and_starts_again() -> None:
    traffic.take()
    traffic.add("features", 3)
    traffic.add("features", 4)
    assert traffic.take() == {"features": 7, "gradients": 0, "parameters": 0, "control": 0}
    assert not any(traffic.take().values())


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        traffic.add("feature", 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_collective_counts_its_ring_bytes(world_size: int) -> None:
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    port = unused_port()
    ranks = [context.Process(target=use_all, args=(rank, world_size, port, found)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    counted = found.get(timeout=240)
    for process in ranks:
        process.join(timeout=240)
        assert process.exitcode == 0
    others = world_size - 1
    gathered = 4 * ROWS * WIDTH * others  # an all-gather passes on this rank's rows, W-1 times
    assert counted["gather"] == only("features", gathered)
    assert counted["gradient"] == only("features", 2 * gathered)  # an all-reduce, on gloo
    assert counted["sum"] == only("control", 2 * 8 * 5 * others // world_size)
    assert counted["objects"] == only("control", len(pickle.dumps(["value"])) * others)
    assert counted["object"] == only("control", len(pickle.dumps("value")) * others // world_size)
    assert counted["barrier"] == only("control", 0)


def only(kind: str, sent_bytes: int) -> dict[str, int]:
    return dict.fromkeys(traffic.KINDS, 0) | {kind: sent_bytes}


def use_all(rank: int, world_size: int, port: int, found: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    counted = {}
    rows_BE = torch.ones(ROWS, WIDTH, requires_grad=True)
    gathered_GE = process_group.gather_with_gradient(rows_BE)
    counted["gather"] = traffic.take()
    gathered_GE.sum().backward()
    counted["gradient"] = traffic.take()
    process_group.sum_over_ranks(torch.arange(5))
    counted["sum"] = traffic.take()
    process_group.gather_objects(["value"])
    counted["objects"] = traffic.take()
    process_group.broadcast_object("value")
    counted["object"] = traffic.take()
    process_group.barrier()
    counted["barrier"] = traffic.take()
    if rank == 0:
        found.put(counted)
    dist.destroy_process_group()
