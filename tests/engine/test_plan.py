from __future__ import annotations

import pytest

from cmpt.engine.plan import Plan
from cmpt.engine.schedule import learning_rate
from cmpt.recipe.schema import Engine, Evaluation, Masking, Optimizer, Phase, Recipe, Run


def recipe(**run: str) -> Recipe:
    optimizer = Optimizer(lr=1.0, warmup="10 steps")
    return Recipe(run=Run(duration="100 steps", **run), optimizer=optimizer, engine=Engine(batch_size=8))


def test_warm_up_is_linear_and_the_cosine_ends_at_the_floor() -> None:
    assert learning_rate(5, 10, 110, 1.0, 0.1) == 0.5
    assert learning_rate(10, 10, 110, 1.0, 0.1) == 1.0
    assert learning_rate(60, 10, 110, 1.0, 0.1) == pytest.approx(0.55)
    assert learning_rate(110, 10, 110, 1.0, 0.1) == pytest.approx(0.1)


def test_rates_go_by_samples_so_a_batch_twice_as_large_takes_half_the_steps() -> None:
    small, large = recipe(), recipe()
    for plan in (small, large):
        plan.run.duration = "800 samples"
        plan.optimizer.warmup = "80 samples"
    large.engine.batch_size = 16
    first, second = Plan(small, 100).phases[0], Plan(large, 100).phases[0]
    assert (first.last_step, second.last_step) == (100, 50)
    assert first.learning_rate(40) == pytest.approx(second.learning_rate(20))


def test_epochs_become_steps_by_the_size_of_the_data() -> None:
    settings = recipe()
    settings.run.duration = "3 epochs"
    assert Plan(settings, 100).total_steps == 38  # 300 samples in batches of 8, rounded up


def test_everything_is_due_at_its_interval_and_at_the_end() -> None:
    settings = recipe(log_every="30 steps", checkpoint_every="40 steps", stop_after="70 steps")
    settings.evaluation = Evaluation(every=None)
    plan = Plan(settings, 100)
    assert [step for step in range(1, 101) if plan.logs(step)] == [1, 30, 60, 70, 90, 100]
    assert [step for step in range(1, 101) if plan.saves(step)] == [40, 70, 80, 100]
    assert [step for step in range(1, 101) if plan.evaluates(step)] == [70, 100]


def test_nothing_remains_where_stop_after_is_reached_or_passed() -> None:
    plan = Plan(recipe(stop_after="70 steps"), 100)
    assert len(plan.remaining(69)) == 1
    assert plan.remaining(70) == plan.remaining(80) == []
    assert plan.ends(70) and plan.ends(80) and not plan.ends(69)


def test_each_phase_has_its_own_schedule() -> None:
    settings = recipe()
    settings.run.duration = None
    settings.masking = Masking(strategy="cluster")
    settings.phases = [
        Phase(name="masked", duration="50 steps"),
        Phase(name="whole", duration="20 steps", set={"masking.strategy": "none", "optimizer.lr": 0.2}),
    ]
    plan = Plan(settings, 100)
    first, second = plan.phases
    assert (first.first_step, first.last_step, second.last_step) == (0, 50, 70)
    assert first.learning_rate(10) == 1.0 and second.learning_rate(60) == pytest.approx(0.2)
    assert second.phase.masking.strategy == "none"
    assert [p.phase.name for p in plan.remaining(49)] == ["masked", "whole"]
    assert [p.phase.name for p in plan.remaining(50)] == ["whole"]
