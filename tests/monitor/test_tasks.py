from __future__ import annotations

from pathlib import Path

import pytest

from cmpt.monitor.console import describe_results
from cmpt.monitor.monitor import Monitor
from cmpt.monitor.report import write_report
from cmpt.monitor.tasks import by_task, chance_of, fractions, sizes

RESULTS = {
    "cifar/top1": 0.25,
    "cifar/top5": 0.75,
    "cifar/mean_per_class": 0.2,
    "cifar/samples": 1000,
    "cifar/classes": 10,
    "cifar/seconds": 3.25,
    "crepe/accuracy": 0.6,
    "crepe/swap_obj": 0.55,
    "crepe/samples": 40,
    "probe/top1": 0.5,
    "probe/l2": 0.01,
    "probe/converged": 1.0,
    "probe/fit_s": 2.0,
    "probe/classes": 4,
}


def test_what_a_task_measures_is_told_from_what_describes_it() -> None:
    tasks = by_task({"seconds": 9.0, "image_to_text_r1": 0.5, **RESULTS})
    assert list(tasks) == ["cifar", "crepe", "probe"]
    assert list(fractions(tasks["cifar"])) == [
        ("top1", "Top-1"),
        ("mean_per_class", "Mean per class"),
        ("top5", "Top-5"),
    ]
    assert list(fractions(tasks["crepe"])) == [("accuracy", "Accuracy"), ("swap_obj", "Swap obj")]
    assert list(fractions(tasks["probe"])) == [("top1", "Top-1")]
    assert sizes(tasks["cifar"]) == "1,000 samples, 10 classes, 3.2 s"


@pytest.mark.parametrize(
    ("task", "measure", "expected"),
    [("cifar", "top1", 0.1), ("cifar", "top5", 0.5), ("crepe", "swap_obj", 0.5), ("probe", "top1", 0.25)],
)
def test_chance_is_that_of_a_guess(task: str, measure: str, expected: float) -> None:
    assert chance_of(measure, by_task(RESULTS)[task]) == expected


def test_chance_of_retrieval_is_not_known() -> None:
    assert chance_of("image_to_text_r1", {"images": 5, "texts": 25}) is None


def test_the_console_says_one_figure_of_each_task() -> None:
    assert describe_results(RESULTS) == "cifar: top-1 25.0 %; crepe: accuracy 60.0 %; probe: top-1 50.0 %"
    both = describe_results({"pairs": 500, "zero_shot_top1": 0.1, **RESULTS})
    assert both.startswith("held-out, 500 pairs: zero-shot top-1 10.0 %; cifar: top-1 25.0 %; ")


def test_the_report_has_a_table_and_a_curve_for_each_task(tmp_path: Path) -> None:
    with Monitor(tmp_path, "toy", 20, 0) as monitor:
        monitor.evaluation(10, {key: value / 2 for key, value in RESULTS.items()})
        monitor.evaluation(20, RESULTS)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for said in ("cifar (1,000 samples, 10 classes, 3.2 s)", "Mean per class", "Swap obj", "60.0 %", "50.0 %"):
        assert said in page, said
    assert page.count("<svg") == 3
    assert "held-out pairs" not in page
