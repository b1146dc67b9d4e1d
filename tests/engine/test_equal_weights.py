from __future__ import annotations

import socket

import pytest
import torch
from engine.ranks import Matrix

from cmpt.engine.equal_weights import checksum

WEIGHT = "visual.transformer.blocks.1.c_fc.weight"


def test_every_single_flipped_bit_changes_the_checksum() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = int(checksum(values))
    for bit in range(32):
        values.view(torch.int32)[bit * 31] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
        assert int(checksum(values)) != before
        values.view(torch.int32)[bit * 31] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert int(checksum(values)) == before


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_flipped_bit_names_the_rank_and_the_tensor(world: int, matrix: Matrix) -> None:
    """At every ZeRO stage, before the next step; and what has become of it after that step.

    Above stage 0 the step hides it: a flipped copy is overwritten, a flipped master goes to all ranks. No false alarm
    in 20 steps, before and after each, refused batches among them.
    """
    found = matrix(world, "guard_matrix", "weights")
    assert len(found) == 7 + 1
    host, last = socket.gethostname(), world - 1
    who = f"rank {last} on {host} differs from the rest in"
    if world == 2:
        who = f"rank 0 on {host}, rank 1 on {host} differ in"
    for case, told in found.items():
        assert told.pop("false alarms") == [], case
        for flipped, fault in told.items():
            what, _, when = flipped.partition(" ")
            if what == "master":
                at_once = f"rank {last} on {host} differs from its own master weights in"
                assert (fault or "").startswith(at_once) if when == "at once" else fault is None, (case, flipped)
            elif case.startswith("stage=0"):
                name = "the average of visual.patch_embedding.weight" if what == "average" else what
                assert fault.startswith(f"{who} {name}"), (case, flipped)
            else:
                assert fault == (f"{who} {what}" if when == "at once" else None), (case, flipped)
        copies = [] if "pieces only" in case else [WEIGHT, "logit_scale"]
        others = "average" if case.startswith("stage=0") else "master"
        assert set(told) == {f"{what} {when}" for what in (*copies, others) for when in ("at once", "a step later")}
