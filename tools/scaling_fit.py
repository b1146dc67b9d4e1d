"""Fits the step model (step_model.py) to measured points, and checks it on points that it was not fitted to.

What is fitted, all by robust least squares without negative values and of relative errors:

    compute     seconds per FLOP (its own for every number of processes per node, which share memory and clock), a
                constant, and a constant more at ZeRO stages 1 and 2 and at 3
    optimizer   a constant (one more above stage 0) and seconds per element that a rank steps
    links       latency and bandwidth of an all-reduce, inside a node and between nodes, from the benchmark of
                collectives on the same hosts; where it shows none, from the points' own all-reduces
    exposed     for every kind of collective and stage: measured seconds / what latency and bytes of the link make,
                where compute lasts long enough to hide the rest
    cost        the same where that cannot be why: collectives that are slower in training than alone, or cheaper,
                since they run side by side or pass the link once where an all-reduce passes it twice
    stragglers  the spread of compute that explains by how much the others wait for the slowest rank
    loader      samples per second where data were waited for at all

Every point is predicted by a fit to all other points, and those with the most processes once more by a fit to those
with fewer, which is what a forecast is. Of a point's repeats the one in the middle counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench_collectives import fit_link, read_collectives
from cmpt.models.flops import loss_flops
from least_squares import solve
from scaling_read import MEASURED_TERMS
from step_model import (
    BACKWARD_SHARE,
    COMMUNICATION,
    Link,
    Machine,
    Work,
    collective_seconds,
    expected_largest,
    rounds,
    step_terms,
)

Record = Mapping[str, Any]


class InTraining(NamedTuple):
    """What collectives of a kind take in training: see `Machine`."""

    cost: float
    exposed: float


NodesLink = tuple[int, Link]
"""A benchmarked link, and the number of nodes that it joined."""
NO_LINK = Link(0.0, float("inf"))
_DATA_WAITS = 0.02
"""Share of the step from which on the loader is what the step waits for."""
_OTHER_WORK = 1.2
"""How many times the FLOPs: masks and captions alone make steps differ by less."""


@dataclass(frozen=True)
class Sample:
    """A point, that of its repeats whose step time is in the middle, and the work that it is."""

    name: str
    record: Record
    zero_stage: int
    work: Work
    terms_s: Mapping[str, float]
    step_s: float

    @property
    def images_per_s(self) -> float:
        return float(self.record["batch_size"] / self.step_s)

    @property
    def size(self) -> int:
        """Pairs per process in weak scaling, the global batch in strong scaling."""
        batch = self.record["batch_size"]
        return int(batch // self.work.world_size if self.record["scaling"] == "weak" else batch)


@dataclass(frozen=True)
class Fit:
    """Machines by what they depend on; see `machine`."""

    seconds_per_flop: Mapping[int, float]
    """By ranks per node."""
    fixed_s: float
    sharded_s: Mapping[int, float]
    """By ZeRO stage: what compute takes longer."""
    optimizer_fixed_s: float
    optimizer_sharded_s: float
    optimizer_s_per_element: float
    inside: Link
    between: Link
    collectives: Mapping[tuple[str, int], InTraining]
    """By kind and ZeRO stage."""
    straggler_deviation: float
    loader_samples_per_s: float | None

    def machine(self, zero_stage: int, ranks_per_node: int) -> Machine:
        """For numbers of ranks per node that were not measured: the nearest that was."""
        nearest = min(self.seconds_per_flop, key=lambda ranks: abs(ranks - ranks_per_node))
        collectives = {}
        for kind in COMMUNICATION:
            same = [found for (of, _), found in self.collectives.items() if of == kind]
            mean = InTraining(*map(statistics.fmean, zip(*same, strict=True))) if same else InTraining(1.0, 1.0)
            collectives[kind] = self.collectives.get((kind, zero_stage), mean)
        per_element = self.optimizer_s_per_element
        return Machine(
            flops_per_s=1 / self.seconds_per_flop[nearest],
            optimizer_elements_per_s=1 / per_element if per_element else float("inf"),
            inside=self.inside,
            between=self.between,
            fixed_s=self.fixed_s,
            sharded_s=self.sharded_s.get(zero_stage, 0.0),
            optimizer_fixed_s=self.optimizer_fixed_s,
            optimizer_sharded_s=self.optimizer_sharded_s if zero_stage else 0.0,
            cost={kind: found.cost for kind, found in collectives.items()},
            exposed={kind: found.exposed for kind, found in collectives.items()},
            straggler_deviation=self.straggler_deviation,
            loader_samples_per_s=self.loader_samples_per_s,
        )

    def terms(self, sample: Sample) -> dict[str, float]:
        """Predicted seconds by term of step_model.TERMS."""
        return step_terms(sample.work, self.machine(sample.zero_stage, sample.work.ranks_per_node))


def samples_of(records: Iterable[Record], recipes: Mapping[str, Any], parameters: Mapping[str, int]) -> list[Sample]:
    """The points that were measured, in their order; `recipes` and `parameters` of their models by point name."""
    by_point: dict[str, list[Record]] = {}
    for record in records:
        if record["status"] == "done":
            by_point.setdefault(record["point"], []).append(record)
    found = []
    for name, repeats in by_point.items():
        record, recipe = sorted(repeats, key=lambda each: each["step_s"])[(len(repeats) - 1) // 2], recipes[name]
        world, batch = record["world_size"], record["batch_size"]
        terms = {term: record["terms_s"][term] for term in MEASURED_TERMS}
        rows = batch / world
        of_loss = loss_flops(batch, rows, recipe.model.embed_dim, recipe.loss.kind)
        stage = 0 if world == 1 else recipe.engine.zero_stage
        work = Work(
            world_size=world,
            ranks_per_node=record["ranks_per_node"],
            samples=rows,
            tower_flops=record["flops_per_sample"] * rows - of_loss,
            loss_flops=of_loss,
            stepped_elements=parameters[name] / (world if stage else 1),
            sent_bytes=record["sent_bytes"],
            calls=record["calls"],
        )
        found.append(Sample(name, record, stage, work, terms, sum(terms.values())))
    return found


def fit(samples: Sequence[Sample], links: Sequence[NodesLink] = ()) -> Fit:
    """`links` as `read_links` has them. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no point was measured: there is nothing to fit")
    # A rate must be left, or more pairs would cost nothing.
    fixed, sharded, third, by_ranks = _compute(samples, constant=_tells_constant_from_rate(samples))
    if not by_ranks:
        fixed, sharded, third, by_ranks = _compute(samples, constant=False)
    optimizer = [[1.0, sample.zero_stage > 0, sample.work.stepped_elements] for sample in samples]
    constant, more, per_element = solve(optimizer, [sample.terms_s["optimizer"] for sample in samples])
    inside = _link(samples, [link for nodes, link in links if nodes == 1], several_nodes=False)
    between = _link(samples, [link for nodes, link in links if nodes > 1], several_nodes=True)
    found = Fit(
        seconds_per_flop=by_ranks,
        fixed_s=fixed,
        sharded_s={1: sharded, 2: sharded, 3: third},
        optimizer_fixed_s=constant,
        optimizer_sharded_s=more,
        optimizer_s_per_element=per_element,
        inside=inside,
        between=between,
        collectives={},
        straggler_deviation=_deviation(samples),
        loader_samples_per_s=_loader(samples),
    )
    return replace(found, collectives=_collectives(samples, found))


def _tells_constant_from_rate(samples: Sequence[Sample]) -> bool:
    """Whether some number of processes per node was measured with different work."""
    by_ranks: dict[int, list[float]] = {}
    for sample in samples:
        by_ranks.setdefault(sample.work.ranks_per_node, []).append(sample.work.flops)
    return any(max(flops) > _OTHER_WORK * min(flops) for flops in by_ranks.values())


def _compute(samples: Sequence[Sample], constant: bool) -> tuple[float, float, float, dict[int, float]]:
    """(constant, more of it at stages 1 and 2, at 3, seconds per FLOP by ranks per node, without those that are 0)."""
    per_node = sorted({sample.work.ranks_per_node for sample in samples})
    rows = []
    for sample in samples:
        by_node = [sample.work.flops if sample.work.ranks_per_node == ranks else 0.0 for ranks in per_node]
        of_stage = [constant and sample.zero_stage in (1, 2), constant and sample.zero_stage == 3]
        rows.append([float(constant), *map(float, of_stage), *by_node])
    fixed, sharded, third, *rates = solve(rows, [sample.terms_s["compute"] for sample in samples])
    return fixed, sharded, third, {ranks: rate for ranks, rate in zip(per_node, rates, strict=True) if rate > 0}


def held_out(samples: Sequence[Sample], links: Sequence[NodesLink] = ()) -> dict[str, dict[str, float]]:
    """By point: terms that a fit to all other points predicts. A study of one point has none to hold out."""
    if len(samples) < 2:
        return {}
    return {
        sample.name: fit([other for other in samples if other is not sample], links).terms(sample) for sample in samples
    }


def largest_held_out(samples: Sequence[Sample], links: Sequence[NodesLink] = ()) -> dict[str, dict[str, float]]:
    """By point with the most processes: terms that a fit to all points with fewer predicts; the benchmark of its links
    is not held out. Empty where there is one number of processes."""
    most = max((sample.work.world_size for sample in samples), default=1)
    fewer = [sample for sample in samples if sample.work.world_size < most]
    if not fewer:
        return {}
    found = fit(fewer, links)
    return {sample.name: found.terms(sample) for sample in samples if sample.work.world_size == most}


def training_link(samples: Sequence[Sample], several_nodes: bool) -> Link | None:
    """Latency and bandwidth as training's own all-reduces show them: of gradients (at stage 3 they are scattered) and
    of counts; None without any."""
    rows, seconds = [], []
    for sample in samples:
        if sample.work.world_size == 1 or (sample.work.nodes > 1) != several_nodes or sample.zero_stage == 3:
            continue
        for kind in ("gradients", "control"):
            calls = sample.work.calls[kind] * rounds(sample.work.world_size, ring=False)
            if calls and sample.terms_s[kind] > 0:
                rows.append([calls, sample.work.sent_bytes[kind]])
                seconds.append(sample.terms_s[kind])
    if len(rows) < 2:
        return None
    latency, per_byte = solve(rows, seconds)
    return Link(latency, 1 / per_byte) if per_byte else None


def read_links(collectives: Iterable[Path]) -> list[NodesLink]:
    """The link of the all-reduce in each file of the benchmark, whose latency is that of a whole call."""
    found = []
    for path in collectives:
        measured = read_collectives(path)
        latency, bandwidth, _ = fit_link(measured["ops"]["all_reduce"]["points"])
        hops = max(1, rounds(measured["world_size"], ring=False))
        found.append((len(set(measured["hosts"])), Link(latency / hops, bandwidth)))
    return found


def _link(samples: Sequence[Sample], benchmarked: Sequence[Link], several_nodes: bool) -> Link:
    rates = [link.bytes_per_s for link in benchmarked if link.bytes_per_s != float("inf")]
    if rates:
        latency = statistics.fmean(link.latency_s for link in benchmarked)
        return Link(latency, statistics.harmonic_mean(rates))
    return training_link(samples, several_nodes) or NO_LINK


def _collectives(samples: Sequence[Sample], found: Fit) -> dict[tuple[str, int], InTraining]:
    hides = {}
    for sample in samples:
        loss_s = sample.work.loss_flops / found.machine(sample.zero_stage, sample.work.ranks_per_node).flops_per_s
        hides[sample.name] = BACKWARD_SHARE * max(0.0, sample.terms_s["compute"] - loss_s)
    in_training = {}
    for kind, stage in product(COMMUNICATION, sorted({sample.zero_stage for sample in samples})):
        alone = {}
        for sample in samples:
            machine = found.machine(stage, sample.work.ranks_per_node)
            if sample.zero_stage == stage and (seconds := collective_seconds(sample.work, machine, kind)) > 0:
                alone[sample.name] = (sample.terms_s[kind], seconds)
        if not alone:
            continue
        ratio = sum(measured for measured, _ in alone.values()) / sum(seconds for _, seconds in alone.values())
        hidden = {name: (1 - ratio) * seconds for name, (_, seconds) in alone.items()}
        if ratio >= 1 or any(seconds > hides[name] for name, seconds in hidden.items()):
            in_training[kind, stage] = InTraining(ratio, 1.0)
            continue
        in_training[kind, stage] = InTraining(1.0, ratio)
        for name, seconds in hidden.items():
            hides[name] -= seconds
    return in_training


def _deviation(samples: Sequence[Sample]) -> float:
    found = [
        sample.terms_s["stragglers"] / sample.terms_s["compute"] / expected_largest(sample.work.world_size)
        for sample in samples
        if sample.work.world_size > 1
    ]
    return statistics.median(found) if found else 0.0


def _loader(samples: Sequence[Sample]) -> float | None:
    waited = [sample for sample in samples if sample.terms_s["data"] > _DATA_WAITS * sample.step_s]
    if not waited:
        return None
    fastest = max(sample.work.samples / sample.step_s for sample in samples)  # a short wait of a short step is no limit
    return max(fastest, statistics.median(sample.work.samples / sample.step_s for sample in waited))
