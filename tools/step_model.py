"""How long a training step takes: what a rank does in it (`Work`), how fast its machine is (`Machine`), by term.

The one model behind `plan.py` (machines from data sheets) and `scaling.py` (machines fitted to measured points):

    compute     tower FLOPs of the rank / FLOP/s that it reaches, and what a step costs whatever its size
    loss        FLOPs of the rank's rows of logits / their rate; with B pairs a rank they grow with the world
    optimizer   elements that the rank steps / elements per second, and a part that does not depend on them
    features, gradients, parameters, control
                the collectives of each kind (cmpt/dist/traffic.py) as far as compute does not hide them: for every call
                a latency per round, and bytes / bandwidth (Hockney's model, Thakur et al. 2005,
                doi 10.1177/1094342005051521)
    stragglers  how much longer the slowest rank takes than the mean: the expected largest of W normal deviates
    data        what the loader is slower than all of that

A collective over several nodes goes through each node once, so its bytes, in the ring count of one rank, pass the
node's network once: the slower of both links decides. Rounds: log2 of the world size, as in a tree; `ring=True` counts
W - 1 instead, which is what libraries without a tree for gathers pay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

COMMUNICATION = ("features", "gradients", "parameters", "control")
TERMS = ("compute", "loss", "optimizer", *COMMUNICATION, "stragglers", "data")
BACKWARD_SHARE = 2 / 3
"""Of the towers' compute: what can hide communication."""


@dataclass(frozen=True)
class Link:
    latency_s: float
    """Of a collective, per round."""
    bytes_per_s: float
    """Sent by one rank inside of a node; between nodes by all ranks of a node together. One direction."""


@dataclass(frozen=True)
class Work:
    """What one rank does in one step; ranks differ by their masks and captions only, this is their mean."""

    world_size: int
    ranks_per_node: int
    samples: float
    """B, pairs of this rank."""
    tower_flops: float
    loss_flops: float
    stepped_elements: float
    """Parameters that this rank's optimizer steps: all of them at ZeRO stage 0, 1/W above."""
    sent_bytes: Mapping[str, float]
    """By kind of COMMUNICATION, in the ring count of one rank."""
    calls: Mapping[str, float]
    """Collectives by kind."""

    @property
    def flops(self) -> float:
        return self.tower_flops + self.loss_flops

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)


@dataclass(frozen=True)
class Machine:
    """How fast a rank and its links are."""

    flops_per_s: float
    """That the towers reach: peak times MFU."""
    optimizer_elements_per_s: float
    inside: Link
    """Between ranks of one node."""
    between: Link
    """Between nodes."""
    fixed_s: float = 0.0
    """Of compute, whatever the batch."""
    loss_flops_per_s: float | None = None
    """None: as the towers."""
    sharded_s: float = 0.0
    """More of compute with several ranks, which a stage of ZeRO shards between them."""
    optimizer_fixed_s: float = 0.0
    optimizer_sharded_s: float = 0.0
    """The same of the optimizer."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """By kind: how many times as long as its latency and bytes say a collective takes in training; 1 where it is not
    named."""
    exposed: Mapping[str, float] = field(default_factory=dict)
    """By kind: the share of that which compute does not hide, if it lasts long enough; 1 where it is not named."""
    straggler_deviation: float = 0.0
    """Standard deviation of a rank's compute, the loss included, within a step, as a share of the mean."""
    loader_samples_per_s: float | None = None
    """Of one rank; None: data never wait."""
    ring: bool = False
    """Collectives need W - 1 rounds instead of log2(W)."""


def step_terms(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds by term; their sum is the step."""
    several = work.world_size > 1
    compute = machine.fixed_s + several * machine.sharded_s + work.tower_flops / machine.flops_per_s
    optimizer = machine.optimizer_fixed_s + several * machine.optimizer_sharded_s
    terms = {
        "compute": compute,
        "loss": work.loss_flops / (machine.loss_flops_per_s or machine.flops_per_s),
        "optimizer": optimizer + work.stepped_elements / machine.optimizer_elements_per_s,
    }
    hides = BACKWARD_SHARE * compute  # the loss hides nothing: it stands between the towers' passes
    for kind in COMMUNICATION:
        seconds = machine.cost.get(kind, 1.0) * collective_seconds(work, machine, kind)
        hidden = min((1 - machine.exposed.get(kind, 1.0)) * seconds, hides)
        hides -= hidden
        terms[kind] = seconds - hidden
    terms["stragglers"] = (compute + terms["loss"]) * machine.straggler_deviation * expected_largest(work.world_size)
    busy = sum(terms.values())
    rate = machine.loader_samples_per_s
    terms["data"] = 0.0 if rate is None else max(0.0, work.samples / rate - busy)
    return terms


def collective_seconds(work: Work, machine: Machine, kind: str) -> float:
    """All collectives of a kind in one step, hidden or not."""
    if work.world_size == 1:
        return 0.0
    link = machine.inside
    if work.nodes > 1:
        slower = min(machine.between.bytes_per_s, machine.inside.bytes_per_s if work.ranks_per_node > 1 else math.inf)
        link = Link(max(machine.between.latency_s, machine.inside.latency_s), slower)
    latency = work.calls.get(kind, 0) * rounds(work.world_size, machine.ring) * link.latency_s
    return latency + work.sent_bytes.get(kind, 0) / link.bytes_per_s


def rounds(world_size: int, ring: bool) -> int:
    """One after the other that a collective over so many ranks needs."""
    return world_size - 1 if ring else math.ceil(math.log2(max(1, world_size)))


def expected_largest(count: int) -> float:
    """Of `count` standard normal deviates (Blom 1958: the quantile of (n - 3/8) / (n + 1/4)); 0 for one."""
    return 0.0 if count == 1 else NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
