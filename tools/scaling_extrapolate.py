"""From a fitted machine to numbers of nodes that nobody measured: efficiency, which term takes over, what moves it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cmpt.engine.traffic import parts_of, recipe_bytes
from cmpt.models.flops import forward_flops, loss_flops, recomputed_flops
from cmpt.recipe.schema import Recipe
from plan_memory import Sharding
from plan_run import zero_calls
from scaling_fit import Fit, Sample
from step_model import COMMUNICATION, Link, Machine, Work, step_terms

NODES = tuple(2**power for power in range(11))
TAKES_OVER = 0.1
"""Share of the step from which on a term is said to have taken over."""
LOSSES = ("loss", *COMMUNICATION, "stragglers", "data")
"""Terms that more nodes bring; compute and optimizer are what one node does too."""


@dataclass(frozen=True)
class Shape:
    """What does not depend on the number of nodes."""

    recipe: Recipe
    sizes: Sequence[Sequence[int]]
    """Of the parameters, by optimizer group (cmpt.engine.traffic.parameter_sizes)."""
    forward_flops_per_sample: float
    """Of the towers, one pass."""
    calls: Mapping[str, float]
    """Collectives of a step without gradient caching, by kind."""
    nccl: bool

    def work(self, world_size: int, ranks_per_node: int, batch_size: int) -> Work:
        """What a rank does in a step at this world size, whether or not the recipe's streams allow it."""
        engine, model = self.recipe.engine, self.recipe.model
        rows, parameters = batch_size / world_size, sum(map(sum, self.sizes))
        parts = parts_of(self.recipe, rows)
        sent = recipe_bytes(self.recipe, self.sizes, world_size, batch_size, self.nccl)
        return Work(
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            samples=rows,
            tower_flops=passes(self.recipe, parts) * self.forward_flops_per_sample * rows,
            loss_flops=loss_flops(batch_size, rows, model.embed_dim or 0, self.recipe.loss.kind),
            stepped_elements=parameters / (world_size if engine.zero_stage and world_size > 1 else 1),
            sent_bytes=sent if world_size > 1 else {},
            calls=_times_gathers(self.calls, engine.zero_stage, gathers(self.recipe, self.sizes, parts)),
        )


def shape_of(samples: Sequence[Sample], recipe: Recipe, sizes: Sequence[Sequence[int]], nccl: bool) -> Shape | None:
    """What the points of one setting have in common, gradient caching taken out; None where only single processes were
    measured: of their collectives nothing is known."""
    parts = {sample.name: parts_of(recipe, sample.work.samples) for sample in samples}
    forward = [of.work.tower_flops / of.work.samples / passes(recipe, parts[of.name]) for of in samples]
    counted = [
        _times_gathers(of.work.calls, of.zero_stage, 1 / gathers(recipe, sizes, parts[of.name]))
        for of in samples
        if of.work.world_size > 1
    ]
    if not counted:
        return None
    calls = {kind: statistics.fmean(of[kind] for of in counted) for kind in COMMUNICATION}
    return Shape(recipe, sizes, statistics.fmean(forward), calls, nccl)


def passes(recipe: Recipe, parts: int) -> float:
    """Of the towers in a step, in units of a forward pass: the backward pass is two, gradient caching brings one more,
    and recomputed blocks the share that they are of whole images and captions (cmpt.models.flops.training_flops)."""
    model = recipe.model
    recomputed = 0.0
    if model.activation_checkpointing:
        patches, words = (recipe.image.size // (model.patch_size or 1)) ** 2, model.context_length
        again = recomputed_flops(model.vision, [patches + 1]) + recomputed_flops(model.text, [words])
        recomputed = again / forward_flops(model, [patches], [words])
    return 3 + recomputed + (parts > 1)


def gathers(recipe: Recipe, sizes: Sequence[Sequence[int]], parts: int) -> float:
    """How many times as often stage 3 gathers parameters with so many parts of gradient caching as without it."""
    if parts == 1:
        return 1.0
    groups = [{str(number): size for number, size in enumerate(group)} for group in sizes]
    sharding = Sharding(groups, recipe.engine, 2, averaged=False, touched=False)
    with_parts, without = (zero_calls(sharding, of)["parameters"] for of in (parts, 1))
    return with_parts / without if without else 1.0


def _times_gathers(calls: Mapping[str, float], zero_stage: int, times: float) -> dict[str, float]:
    """Gradient caching makes stage 3 gather its parameters more often, and nothing else."""
    return {kind: count * times if (kind, zero_stage) == ("parameters", 3) else count for kind, count in calls.items()}


@dataclass(frozen=True)
class Curve:
    """A recipe over numbers of nodes."""

    scaling: str
    """"weak": so many pairs per rank; "strong": the global batch stays."""
    settings: Mapping[str, object]
    """Of the study's sweep."""
    ranks_per_node: int
    batch_of: Callable[[int], int]
    """Global batch of a world size."""
    shape: Shape
    machine: Machine

    @property
    def nodes(self) -> list[int]:
        """Those of NODES at which every rank has a pair."""
        return [n for n in NODES if self.batch_of(n * self.ranks_per_node) >= n * self.ranks_per_node]

    def terms(self, nodes: int, machine: Machine | None = None) -> dict[str, float]:
        world = nodes * self.ranks_per_node
        work = self.shape.work(world, self.ranks_per_node, self.batch_of(world))
        return step_terms(work, machine or self.machine)

    def images_per_s(self, nodes: int, machine: Machine | None = None) -> float:
        return self.batch_of(nodes * self.ranks_per_node) / sum(self.terms(nodes, machine).values())

    def efficiency(self, nodes: int, machine: Machine | None = None) -> float:
        """Images per second and node, against one node."""
        return self.images_per_s(nodes, machine) / nodes / self.images_per_s(1, machine)


def curve_of(
    scaling: str, size: int, settings: Mapping[str, object], ranks_per_node: int, shape: Shape, fit: Fit
) -> Curve:
    """`size`: pairs per rank where `scaling` is "weak", the global batch where it is "strong"."""
    machine = fit.machine(shape.recipe.engine.zero_stage, ranks_per_node)

    def batch_of(world: int) -> int:
        return size * world if scaling == "weak" else size

    return Curve(scaling, settings, ranks_per_node, batch_of, shape, machine)


def takeovers(curve: Curve) -> dict[str, int | None]:
    """By term of LOSSES: the fewest nodes at which it is a tenth of the step; None: at none of them."""
    shares = {n: shares_of(curve.terms(n)) for n in curve.nodes}
    return {term: next((n for n in curve.nodes if shares[n][term] >= TAKES_OVER), None) for term in LOSSES}


def shares_of(terms: Mapping[str, float]) -> dict[str, float]:
    total = sum(terms.values())
    return {term: seconds / total for term, seconds in terms.items()}


def largest_loss(curve: Curve, nodes: int) -> tuple[str, float]:
    """The term of LOSSES that is the largest share of the step, and its share."""
    shares = shares_of(curve.terms(nodes))
    term = max(LOSSES, key=lambda name: shares[name])
    return term, shares[term]


def moves(curve: Curve, nodes: int) -> dict[str, float]:
    """A change -> by how many times it would raise the images per second at so many nodes."""
    machine = curve.machine

    def links(latency: float, bandwidth: float) -> Machine:
        changed = [
            Link(link.latency_s * latency, link.bytes_per_s * bandwidth) for link in (machine.inside, machine.between)
        ]
        return replace(machine, inside=changed[0], between=changed[1])

    hidden = {**machine.exposed, "gradients": 0.0, "parameters": 0.0}
    changes = {
        "links of twice the bandwidth": links(1.0, 2.0),
        "links of half the latency": links(0.5, 1.0),
        "gradients and parameters hidden by compute": replace(machine, exposed=hidden),
        "no stragglers": replace(machine, straggler_deviation=0.0),
        "compute twice as fast": replace(
            machine,
            flops_per_s=2 * machine.flops_per_s,
            fixed_s=machine.fixed_s / 2,
            sharded_s=machine.sharded_s / 2,
        ),
        "latency of a ring (W - 1 rounds) instead of a tree's": replace(machine, ring=True),
    }
    now = curve.images_per_s(nodes)
    found = {name: curve.images_per_s(nodes, changed) / now for name, changed in changes.items()}
    twice = replace(curve, batch_of=lambda world: 2 * curve.batch_of(world))
    found["twice the pairs in a step"] = twice.images_per_s(nodes) / now
    return found
