"""The fit finds the machine that made the points, foretells points that it has not seen, and says how far it is off."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cmpt.models.flops import forward_flops, loss_flops, training_flops
from cmpt.recipe.presets import PRESETS
from cmpt.recipe.schema import Engine, Model
from scaling_extrapolate import Curve, Shape, curve_of, largest_loss, moves, passes, shape_of, takeovers
from scaling_fit import Fit, Sample, fit, held_out, largest_held_out, read_links, samples_of, training_link
from scaling_read import MEASURED_TERMS
from step_model import Link, Machine, Work, rounds, step_terms

PARAMETERS = 4_000_000
SIZES = [[3_000_000, 500_000], [500_000]]
BY_PROCESSES = {1: 2e-11, 2: 3e-11}
TRUE = Machine(
    flops_per_s=0.0,  # by processes per node, below
    optimizer_elements_per_s=2e8,
    inside=Link(2e-4, 4e8),
    between=Link(5e-3, 1.25e7),
    fixed_s=0.1,
    optimizer_fixed_s=0.004,
    cost={"parameters": 1.2},
    exposed={"gradients": 0.7},
    straggler_deviation=0.04,
)
CALLS = {"features": 2, "gradients": 1, "parameters": 5, "control": 7}
SHARDED_S = {0: 0.0, 1: 0.03, 2: 0.03, 3: 0.06}
RECIPE = SimpleNamespace(
    engine=SimpleNamespace(zero_stage=1, micro_batch_size=None, deepspeed={}),
    model=SimpleNamespace(embed_dim=64, activation_checkpointing=False),
    loss=SimpleNamespace(kind="infonce"),
)


def machine(stage: int, ranks_per_node: int) -> Machine:
    return replace(TRUE, flops_per_s=1 / BY_PROCESSES[ranks_per_node], fixed_s=TRUE.fixed_s + SHARDED_S[stage])


def work(world: int, ranks_per_node: int, pairs: int, stage: int) -> Work:
    shape = Shape(recipe(stage), SIZES, 1e9 / 3, CALLS, nccl=False)
    return shape.work(world, ranks_per_node, pairs * world)


def recipe(stage: int, micro: int | None = None) -> Any:
    engine = Engine(zero_stage=stage, micro_batch_size=micro)
    return SimpleNamespace(engine=engine, model=RECIPE.model, loss=RECIPE.loss)


def sample(world: int, ranks_per_node: int, pairs: int, stage: int, noise: float = 0.0, seed: int = 0) -> Sample:
    stage = stage if world > 1 else 0
    of = work(world, ranks_per_node, pairs, stage)
    terms = step_terms(of, machine(stage, ranks_per_node))
    terms["compute"] += terms.pop("loss")  # a measurement has both in one
    draw = random.Random(f"{world} {pairs} {stage} {seed}")
    terms = {term: terms[term] * (1 + draw.uniform(-noise, noise)) for term in MEASURED_TERMS}
    name = f"{world}x{ranks_per_node} {pairs} {stage}"
    return Sample(name, {"device": "made up"}, stage, of, terms, sum(terms.values()))


def one_host(noise: float = 0.0) -> list[Sample]:
    return [
        sample(world, world, pairs, stage, noise) for world in (1, 2) for stage in (1, 2, 3) for pairs in (16, 32, 64)
    ]


def two_hosts(noise: float = 0.0) -> list[Sample]:
    return [sample(world, 1, pairs, stage, noise) for world in (1, 2) for stage in (1, 2, 3) for pairs in (16, 32, 64)]


def bench(path: Path, hosts: list[str], link: Link) -> Path:
    """A file of tools/bench_collectives.py for this link."""
    sizes = [4096 * 4**power for power in range(8)]
    hops = rounds(len(hosts), ring=False)
    points = [{"bytes": n, "seconds": hops * link.latency_s + 2 * n * (len(hosts) - 1) / len(hosts) / link.bytes_per_s,
               "sent_bytes": 2 * n * (len(hosts) - 1) / len(hosts)} for n in sizes]  # fmt: skip
    ops = {"all_reduce": {"points": points, "latency_s": 0.0, "bytes_per_s": 1.0, "fit_error": 0.0}}
    told = {"world_size": len(hosts), "hosts": hosts, "backend": "gloo", "device": "cpu", "ops": ops}
    path.write_text(json.dumps(told))
    return path


def test_the_machine_that_made_the_points_is_found(tmp_path: Path) -> None:
    path = bench(tmp_path / "c.json", ["a", "a"], TRUE.inside)
    found = fit(one_host(), read_links([path]))
    assert found.seconds_per_flop == pytest.approx(BY_PROCESSES, rel=1e-3)
    assert found.fixed_s == pytest.approx(0.1, rel=1e-3)
    assert found.sharded_s == pytest.approx({1: 0.03, 2: 0.03, 3: 0.06}, rel=1e-2)
    assert found.inside.bytes_per_s == pytest.approx(4e8, rel=0.02)
    assert found.inside.latency_s == pytest.approx(2e-4, rel=0.05)
    assert found.collectives["gradients", 1] == pytest.approx((1, 0.7), rel=0.03)
    assert found.collectives["parameters", 3] == pytest.approx((1.2, 1), rel=0.03)
    assert found.straggler_deviation == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_points_are_foretold_that_the_fit_has_not_seen(noise: float, tmp_path: Path) -> None:
    for samples, hosts in ((one_host(noise), ["a", "a"]), (two_hosts(noise), ["a", "b"])):
        link = TRUE.inside if hosts[0] == hosts[1] else TRUE.between
        foretold = held_out(samples, read_links([bench(tmp_path / "c.json", hosts, link)]))
        errors = [abs(sum(foretold[s.name].values()) / s.step_s - 1) for s in samples]
        assert len(errors) == 18 and max(errors) < (0.02 if noise == 0 else 0.12)


def test_the_largest_points_are_foretold_from_the_smaller_ones_alone() -> None:
    samples = [sample(world, 1, pairs, stage) for world in (1, 2, 4, 8) for stage in (1, 2, 3) for pairs in (16, 64)]
    largest = [each for each in samples if each.work.world_size == 8]
    foretold = largest_held_out(samples)
    assert foretold.keys() == {each.name for each in largest}
    assert max(abs(sum(foretold[each.name].values()) / each.step_s - 1) for each in largest) < 0.1
    odd = [replace(each, terms_s={**each.terms_s, "compute": 50.0}, step_s=50.0) for each in largest]
    assert largest_held_out([*samples[: -len(odd)], *odd]) == foretold
    assert largest_held_out(samples[:6]) == largest_held_out([]) == {}, "one number of processes"


def test_a_point_in_which_the_machine_was_busy_does_not_bend_the_fit() -> None:
    samples = one_host(noise=0.02)
    busy = replace(samples[3], terms_s={**samples[3].terms_s, "compute": 3 * samples[3].terms_s["compute"]})
    found = fit([*samples[:3], busy, *samples[4:]])
    assert found.seconds_per_flop == pytest.approx(BY_PROCESSES, rel=0.1)


def test_a_held_out_point_is_not_in_its_own_fit() -> None:
    samples = one_host()
    odd = replace(samples[-1], terms_s={**samples[-1].terms_s, "compute": 50.0}, step_s=50.0)
    foretold = held_out([*samples[:-1], odd])
    assert sum(foretold[odd.name].values()) < 10


def test_compute_is_not_said_to_hide_more_than_it_lasts() -> None:
    """Gathers that run side by side take a tenth of their latencies one after the other: that is cost, not cover."""
    link = Link(0.02, 1.25e7)
    made = []
    for each in two_hosts():
        of = replace(each.work, calls={**each.work.calls, "parameters": 100})
        terms = step_terms(of, replace(machine(each.zero_stage, 1), between=link, cost={"parameters": 0.1}, exposed={}))
        terms["compute"] += terms.pop("loss")
        made.append(replace(each, work=of, terms_s=terms, step_s=sum(terms.values())))
    assert fit(made, [(2, link)]).collectives["parameters", 3] == pytest.approx((0.1, 1), rel=0.01)
    foretold = held_out(made, [(2, link)])
    assert max(abs(sum(foretold[s.name].values()) / s.step_s - 1) for s in made) < 0.05


@pytest.mark.parametrize("megabits", [50, 200, 1000])
def test_the_bandwidth_of_a_link_shows_in_training_s_own_all_reduces(megabits: float) -> None:
    link = Link(0.002, megabits * 1e6 / 8)
    made = [replace(s, terms_s={**s.terms_s, **seconds_over(s.work, link)}) for s in two_hosts()]
    found = training_link(made, several_nodes=True)
    assert found is not None and training_link(made, several_nodes=False) is None
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s, rel=0.01)
    assert found.latency_s == pytest.approx(link.latency_s, rel=0.01)


def seconds_over(of: Work, link: Link) -> dict[str, float]:
    plain = replace(TRUE, flops_per_s=1e12, between=link, cost={}, exposed={})
    return {kind: seconds for kind, seconds in step_terms(of, plain).items() if kind in of.calls}


def test_work_that_differs_by_masks_tells_a_constant_from_a_rate() -> None:
    """One number of pairs, swept mask ratios: the constant of compute shows, and unseen points are foretold."""
    made = []
    for world in (1, 2):
        for share in (1.0, 0.6, 0.3):
            each = sample(world, 1, 16, 1)
            of = replace(each.work, tower_flops=share * each.work.tower_flops)
            terms = step_terms(of, machine(each.zero_stage, 1))
            terms["compute"] += terms.pop("loss")
            made.append(replace(each, name=f"{world} {share}", work=of, terms_s=terms, step_s=sum(terms.values())))
    assert fit(made).fixed_s == pytest.approx(0.1, rel=1e-3)
    foretold = held_out(made)
    assert max(abs(sum(foretold[s.name].values()) / s.step_s - 1) for s in made) < 0.06


def test_masks_and_captions_that_differ_by_chance_tell_nothing_of_a_constant() -> None:
    made = [
        replace(each, work=replace(each.work, tower_flops=each.work.tower_flops * (1 + 0.002 * number)))
        for number, each in enumerate([sample(world, 1, 16, 1) for world in (1, 2, 4)])
    ]
    assert fit(made).fixed_s == 0.0


def test_a_benchmark_without_a_bandwidth_gives_way_to_another_and_to_training() -> None:
    endless = Link(1e-3, float("inf"))
    assert fit(one_host(), [(1, endless), (1, TRUE.inside)]).inside.bytes_per_s == TRUE.inside.bytes_per_s
    assert fit(one_host(), [(1, endless), (1, endless)]).inside == training_link(one_host(), several_nodes=False)


def test_the_spread_of_ranks_is_that_of_all_they_compute_and_the_loss_hides_nothing() -> None:
    of = replace(work(2, 2, 64, 1), loss_flops=1e12)
    fast = replace(machine(1, 2), exposed={"gradients": 0.0}, inside=Link(0.0, 1e3))
    terms = step_terms(of, fast)
    few = step_terms(replace(of, loss_flops=0.0), fast)
    assert terms["stragglers"] == pytest.approx(
        few["stragglers"] * (terms["compute"] + terms["loss"]) / terms["compute"]
    )
    assert terms["gradients"] == few["gradients"] > 0


def test_a_strong_curve_leaves_gradient_caching_where_a_rank_s_pairs_fit_at_once() -> None:
    """Measured at 2 processes with 4 parts; at 8 there is one: a pass less. Without caching stage 3 gathers these three
    parameters at once; with it twice for every part, and each of them in the part's backward pass (plan_run.zero_calls,
    which is tested on real steps)."""
    cached = recipe(3, micro=16)
    measured_work = Shape(cached, SIZES, 1e9, CALLS, nccl=False).work(2, 1, 128)
    assert measured_work.tower_flops == 4 * 1e9 * 64 and measured_work.calls["parameters"] == 4 * (2 + 3) * 5
    made = Sample("p", {}, 3, measured_work, {}, 1.0)
    shape = shape_of([made], cached, SIZES, False)
    assert shape is not None and shape_of([replace(made, work=work(1, 1, 64, 0))], cached, SIZES, False) is None
    at_once = shape.work(8, 1, 128)
    assert at_once.tower_flops == pytest.approx(3 * 1e9 * 16) and at_once.calls == pytest.approx(CALLS)
    assert passes(cached, 1) == 3 and passes(cached, 4) == 4


def test_recomputed_blocks_are_a_share_of_a_pass() -> None:
    """Of ViT-L/14 at 224 pixels, 0.68: the last product of a block is not recomputed, nor the patches' embedding."""
    model = Model(context_length=77, activation_checkpointing=True)
    for key, value in PRESETS["ViT-L-14"].items():
        *owner, name = key.split(".")
        setattr(getattr(model, owner[0]) if owner else model, name, value)
    of = SimpleNamespace(model=model, image=SimpleNamespace(size=224))
    whole = training_flops(model, [256], [77], 1) - loss_flops(1, 1, model.embed_dim or 0, "infonce")
    assert passes(of, 1) == pytest.approx(whole / forward_flops(model, [256], [77]))  # type: ignore[arg-type]
    assert passes(of, 1) == pytest.approx(3.68, abs=0.01)  # type: ignore[arg-type]


def test_single_processes_alone_are_fitted_too() -> None:
    found = fit([s for s in one_host() if s.work.world_size == 1])
    assert found.machine(1, 1).flops_per_s == pytest.approx(1 / BY_PROCESSES[1], rel=1e-3)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit([])


def test_of_the_repeats_of_a_point_the_middle_one_counts() -> None:
    record = {
        "status": "done", "point": "p", "world_size": 2, "ranks_per_node": 2, "batch_size": 64, "device": "cpu",
        "flops_per_sample": 1e9, "sent_bytes": {}, "calls": {},
    }  # fmt: skip
    terms = dict.fromkeys(MEASURED_TERMS, 0.5)
    repeats = [{**record, "step_s": s, "terms_s": {**terms, "compute": s}} for s in (9.0, 1.0, 0.5)]
    failed = {**record, "status": "failed", "point": "q"}
    (found,) = samples_of([*repeats, failed], {"p": recipe(2)}, {"p": PARAMETERS})
    assert found.terms_s["compute"] == 1.0 and found.step_s == sum(found.terms_s.values())
    assert found.zero_stage == 2 and found.work.stepped_elements == PARAMETERS / 2
    assert found.work.loss_flops == 2 * 6 * 32 * 64 * 64
    assert found.work.tower_flops == 32e9 - found.work.loss_flops


def curve(scaling: str, stage: int = 1) -> Curve:
    found: Fit = fit(one_host())
    found = replace(found, between=Link(1e-5, 1e10), inside=Link(1e-6, 1e11))
    shape = Shape(recipe(stage), SIZES, 1e9 / 3, CALLS, nccl=True)
    return curve_of(scaling, {"weak": 64, "strong": 4096}[scaling], {"engine.zero_stage": stage}, 2, shape, found)


def test_efficiency_falls_with_nodes_from_one() -> None:
    for of in (curve("weak"), curve("strong")):
        efficiencies = [of.efficiency(nodes) for nodes in of.nodes]
        assert efficiencies[0] == 1 and all(a >= b for a, b in zip(efficiencies, efficiencies[1:], strict=False))


def test_strong_scaling_ends_where_a_rank_would_have_no_pair() -> None:
    assert curve("strong").nodes[-1] == 1024 and curve("strong").batch_of(2048) == 4096
    few = replace(curve("strong"), batch_of=lambda world: 64)
    assert few.nodes == [1, 2, 4, 8, 16, 32]


def test_in_weak_scaling_the_loss_and_the_features_take_over_for_they_grow_with_the_batch() -> None:
    of = curve("weak")
    at = {nodes: of.terms(nodes) for nodes in (1, 1024)}
    assert at[1024]["loss"] == pytest.approx(1024 * at[1]["loss"])
    assert at[1024]["compute"] == at[1]["compute"]
    slow = replace(of, machine=replace(of.machine, between=Link(1e-5, 1e7)))
    assert takeovers(slow)["features"] is not None and takeovers(slow)["data"] is None
    assert largest_loss(slow, 1024)[0] in ("features", "gradients")


def test_a_single_process_is_foretold_without_the_costs_of_zero() -> None:
    """One rank alone runs as stage 0, so the curve starts where the point was measured."""
    found = fit(two_hosts())
    shape = Shape(recipe(3), SIZES, 1e9 / 3, {"parameters": 5}, nccl=False)
    of = curve_of("weak", 32, {}, 1, shape, found)
    assert of.terms(1)["compute"] == pytest.approx(found.fixed_s + 32e9 * found.seconds_per_flop[1])
    assert of.terms(2)["compute"] == pytest.approx(of.terms(1)["compute"] + found.sharded_s[3])


def test_what_moves_it_is_what_it_is_slow_in() -> None:
    of = curve("strong")
    slow = replace(of, machine=replace(of.machine, between=Link(1e-6, 1e5), exposed={}))
    changed = moves(slow, 16)
    assert changed["links of twice the bandwidth"] == pytest.approx(2, rel=0.05)
    assert changed["links of half the latency"] == pytest.approx(1, rel=0.01)
    assert loss_flops(10, 5, 8, "sigmoid") * 2 == loss_flops(10, 5, 8, "infonce")
