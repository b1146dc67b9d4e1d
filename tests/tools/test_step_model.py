"""The step model: each term by hand, and what it must do at its ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from step_model import TERMS, Link, Machine, Work, collective_seconds, expected_largest, rounds, step_terms

WORK = Work(
    world_size=8,
    ranks_per_node=4,
    samples=32,
    tower_flops=4e12,
    loss_flops=1e12,
    stepped_elements=1e6,
    sent_bytes={"features": 1e6, "gradients": 8e8, "parameters": 4e8, "control": 100},
    calls={"features": 2, "gradients": 3, "parameters": 5, "control": 7},
)
MACHINE = Machine(
    flops_per_s=2e12,
    optimizer_elements_per_s=1e8,
    inside=Link(1e-5, 1e10),
    between=Link(1e-4, 1e9),
    fixed_s=0.5,
    optimizer_fixed_s=0.02,
)


def test_every_term_by_hand() -> None:
    terms = step_terms(WORK, MACHINE)
    assert tuple(terms) == TERMS
    assert terms["compute"] == pytest.approx(0.5 + 2.0)
    assert terms["loss"] == pytest.approx(0.5)
    assert terms["optimizer"] == pytest.approx(0.02 + 0.01)
    # Two nodes: three rounds of the slower link's latency for every call, and the slower link's bandwidth.
    assert terms["features"] == pytest.approx(2 * 3 * 1e-4 + 1e-3)
    assert terms["gradients"] == pytest.approx(3 * 3 * 1e-4 + 0.8)
    assert terms["parameters"] == pytest.approx(5 * 3 * 1e-4 + 0.4)
    assert terms["control"] == pytest.approx(7 * 3 * 1e-4 + 1e-7)
    assert terms["stragglers"] == terms["data"] == 0


def test_inside_of_one_node_the_network_between_nodes_does_not_count() -> None:
    one = replace(WORK, world_size=4)
    assert one.nodes == 1
    assert collective_seconds(one, MACHINE, "gradients") == pytest.approx(3 * 2 * 1e-5 + 0.08)


def test_a_single_process_waits_for_nobody() -> None:
    alone = replace(WORK, world_size=1, ranks_per_node=1)
    terms = step_terms(alone, replace(MACHINE, straggler_deviation=0.1))
    assert not any(terms[term] for term in ("features", "gradients", "parameters", "control", "stragglers"))


def test_compute_hides_what_is_not_exposed_but_no_more_than_the_backward_pass() -> None:
    half = step_terms(WORK, replace(MACHINE, exposed={"gradients": 0.5}))
    assert half["gradients"] == pytest.approx(step_terms(WORK, MACHINE)["gradients"] / 2)
    short = replace(WORK, tower_flops=0.0)
    machine = replace(MACHINE, fixed_s=0.3, exposed={"gradients": 0.0, "parameters": 0.0})
    terms, alone = step_terms(short, machine), step_terms(short, replace(machine, exposed={}))
    hidden = alone["gradients"] + alone["parameters"] - terms["gradients"] - terms["parameters"]
    assert hidden == pytest.approx(0.2), "two thirds of 0.3 s"


def test_collectives_that_are_slower_in_training_than_alone_cost_more() -> None:
    slow = step_terms(WORK, replace(MACHINE, cost={"gradients": 1.5}))
    assert slow["gradients"] == pytest.approx(1.5 * step_terms(WORK, MACHINE)["gradients"])


def test_data_are_waited_for_only_where_the_loader_is_slower_than_the_step() -> None:
    busy = sum(step_terms(WORK, MACHINE).values())
    fast, slow = (replace(MACHINE, loader_samples_per_s=32 / (busy * share)) for share in (0.9, 1.25))
    assert step_terms(WORK, fast)["data"] == 0
    assert sum(step_terms(WORK, slow).values()) == pytest.approx(1.25 * busy)


@pytest.mark.parametrize("count", [2, 8, 64, 1024])
def test_the_expected_largest_of_normal_deviates_is_that_of_a_simulation(count: int) -> None:
    drawn = np.random.default_rng(0).standard_normal((20_000, count)).max(axis=1)
    assert expected_largest(count) == pytest.approx(drawn.mean(), abs=0.03)
    assert expected_largest(1) == 0


def test_rounds_of_a_tree_and_of_a_ring() -> None:
    assert [rounds(world, ring=False) for world in (1, 2, 3, 8, 1024)] == [0, 1, 2, 3, 10]
    assert [rounds(world, ring=True) for world in (1, 2, 8)] == [0, 1, 7]
    assert math.isclose(step_terms(WORK, replace(MACHINE, ring=True))["control"], 7 * 7 * 1e-4 + 1e-7)
