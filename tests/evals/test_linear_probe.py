from __future__ import annotations

import warnings

import pytest
import torch

from cmpt.evals import linear_probe as module
from cmpt.evals.linear_probe import STEPS, Features, best_step, linear_probe, split_by_class, strength


def clouds(count: int, classes: int, spread: float, seed: int) -> Features:
    """Samples around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 6, generator=torch.Generator().manual_seed(99))
    label_N = torch.arange(count) % classes
    return Features(centres[label_N] + spread * torch.randn(count, 6, generator=generator), label_N)


@pytest.mark.parametrize("peak", [0, 1, 5, 37, 48, 95, 96])
def test_the_search_finds_the_peak_with_few_fits(peak: int) -> None:
    asked: list[int] = []

    def score(step: int) -> float:
        asked.append(step)
        return -abs(step - peak)

    assert best_step(score) == (peak, 0.0)
    assert len(asked) == len(set(asked)) <= 7 + 2 * 4


def test_among_equals_the_weakest_is_taken() -> None:
    assert best_step(lambda step: 1.0 if step >= 40 else 0.0) == (40, 1.0)


def test_the_grid_is_that_of_the_paper() -> None:
    assert strength(0) == pytest.approx(1e-6) and strength(STEPS) == pytest.approx(1e6)
    assert strength(9) / strength(1) == pytest.approx(10.0)


def test_a_tenth_of_each_class_is_held_back_and_no_class_is_lost() -> None:
    label_N = torch.tensor([0] * 40 + [1] * 5 + [2])
    kept, held = split_by_class(label_N)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(46))
    assert torch.bincount(label_N[held], minlength=3).tolist() == [4, 1, 0]
    assert torch.equal(split_by_class(label_N)[1], held)


def test_a_probe_separates_what_can_be_separated() -> None:
    found = linear_probe(clouds(90, 3, 0.1, seed=1), clouds(30, 3, 0.1, seed=2))
    assert found["top1"] == found["mean_per_class"] == 1.0 and found["converged"] == 1.0
    assert (found["train_samples"], found["samples"]) == (90, 30)


def test_the_strength_is_chosen_on_the_validation_split_and_all_is_fitted_then() -> None:
    """The validation split's labels are wrong for a strong fit of the training split: another strength is best."""
    train, test = clouds(60, 3, 1.5, seed=1), clouds(300, 3, 1.5, seed=2)
    fair, shuffled = clouds(60, 3, 1.5, seed=3), clouds(60, 3, 1.5, seed=4)
    shuffled = Features(shuffled.feature_ND, shuffled.label_N.roll(1))
    chosen = [linear_probe(train, test, validation) for validation in (fair, shuffled)]
    assert chosen[0]["l2"] != chosen[1]["l2"]
    assert chosen[0]["top1"] > 0.5 and chosen[0]["train_samples"] == 120


def test_a_fit_that_is_cut_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ITERATIONS", 1)
    assert linear_probe(clouds(60, 3, 1.5, seed=1), clouds(30, 3, 1.5, seed=2))["converged"] == 0.0


def test_a_class_of_the_test_split_that_was_never_trained_is_wrong_and_counts() -> None:
    train, test = clouds(60, 2, 0.1, seed=1), clouds(30, 3, 0.1, seed=2)
    found = linear_probe(train, test)
    assert found["top1"] == found["mean_per_class"] == pytest.approx(2 / 3)


def test_a_strength_cannot_be_chosen_on_nothing() -> None:
    few = clouds(3, 3, 0.1, seed=1)
    with pytest.raises(ValueError, match="no class with two samples"):
        linear_probe(few, few)


def test_other_warnings_of_a_fit_are_given_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression.fit

    def warns(self: LogisticRegression, *arguments: object) -> LogisticRegression:
        warnings.warn("something else", RuntimeWarning, stacklevel=2)
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", warns)
    with pytest.warns(RuntimeWarning, match="something else"):
        assert linear_probe(clouds(60, 3, 0.1, seed=1), clouds(30, 3, 0.1, seed=2))["converged"] == 1.0
