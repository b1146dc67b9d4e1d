"""How many bytes this process sends to others, by what they are for: always counted, one addition per collective.

A collective over W ranks counts as what one rank sends in the ring algorithm (Thakur et al., 2005,
doi 10.1177/1094342005051521; NCCL's tests count the same way), whatever the backend really does:

    all-reduce of n bytes                        2 n (W-1) / W
    all-gather into n bytes                        n (W-1) / W
    reduce-scatter of n bytes                      n (W-1) / W
    broadcast or reduce of n bytes                 n (W-1) / W, the mean over ranks

Kinds: "features" (the gather of embeddings and its gradient), "gradients" and "parameters" (of the model), "control"
(counts and Python objects; what a barrier sends is not known and counts nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cmpt.dist.step_clock import clock

KINDS = ("features", "gradients", "parameters", "control")

_sent = dict.fromkeys(KINDS, 0)


def ring_bytes(size_bytes: int, world_size: int, passes: int = 1) -> int:
    """What one of `world_size` ranks sends; 2 `passes` for an all-reduce, 1 for the other collectives."""
    return passes * size_bytes * (world_size - 1) // world_size


def feature_bytes(
    batch_size: int, embed_dim: int, loss: str, world_size: int, holes: bool = False, nccl: bool = True
) -> int:
    """Bytes of "features" that one rank sends in one step, by arithmetic.

    The fp32 gather of [G, 2E] (loss "infonce": both towers) or [G, E] ("sigmoid": captions only), and the
    reduce-scatter of its gradient, as much again. gloo (not `nccl`) has no reduce-scatter everywhere: there an
    all-reduce, twice as much. With `holes`, pairs that are left out, one int64 for each pair more.
    """
    gathered = 4 * batch_size * embed_dim * (2 if loss == "infonce" else 1)
    return ring_bytes((2 if nccl else 3) * gathered + (8 * batch_size if holes else 0), world_size)


def add(kind: str, sent_bytes: int) -> None:
    _sent[kind] += sent_bytes


@contextmanager
def collective(kind: str, sent_bytes: int) -> Iterator[None]:
    """Around a collective in which this rank sends so much: counts the bytes, and the time where a clock runs."""
    add(kind, sent_bytes)
    running = clock()
    if running is None:
        yield
        return
    running.count(kind)
    with running.waiting(kind):
        yield


def take() -> dict[str, int]:
    """Bytes of every kind since the last call; the counters start again at zero."""
    taken = dict(_sent)
    _sent.update(dict.fromkeys(KINDS, 0))
    return taken
