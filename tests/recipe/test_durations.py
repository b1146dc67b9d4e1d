from __future__ import annotations

import pytest

from cmpt.recipe import Duration, parse_duration


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("32 epochs", 32, "epochs"),
        ("2000 steps", 2000, "steps"),
        ("12.8e9 samples", 12.8e9, "samples"),
        ("1.5 epochs", 1.5, "epochs"),
        ("1 epoch", 1, "epochs"),
        (" 1_000steps ", 1000, "steps"),
        (".5 Epochs", 0.5, "epochs"),
        ("0 steps", 0, "steps"),
    ],
)
def test_a_duration_is_an_amount_and_a_unit(text: str, amount: float, unit: str) -> None:
    assert parse_duration(text) == Duration(amount, unit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32", 'has no unit; add "epochs", "steps" or "samples"'),
        ("-1 epochs", "must not be negative"),
        ("1e999 steps", "must be finite"),
        ("3 epchs", 'unknown unit "epchs"; did you mean "epochs"?'),
        ("3 setps", 'unknown unit "setps"; did you mean "steps"?'),
        ("3 hours", 'unknown unit "hours"; expected "epochs", "steps" or "samples"'),
        ("many steps", 'expected a number and a unit, such as "2000 steps"; units are "epochs", "steps" or "samples"'),
        ("", 'expected a number and a unit, such as "2000 steps"; units are "epochs", "steps" or "samples"'),
        ("2,000 steps", 'expected a number and a unit, such as "2000 steps"; units are "epochs", "steps" or "samples"'),
    ],
)
def test_a_wrong_duration_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("32 epochs", 320),
        ("1.1 epochs", 11),  # 1.1 * 1000 / 100 is 11.000000000000002 in binary floating point
        ("0.01 epochs", 1),
        ("1.05 epochs", 11),
        ("7 steps", 7),
        ("6.5 steps", 7),
        ("100 samples", 1),
        ("101 samples", 2),
        ("12.8e9 samples", 128_000_000),
        ("0 steps", 1),
    ],
)
def test_steps_are_rounded_up_and_at_least_one(text: str, steps: int) -> None:
    assert parse_duration(text).steps(samples_per_epoch=1000, batch_size=100) == steps


def test_samples_are_exact_and_may_be_none() -> None:
    assert parse_duration("2000 steps").samples(None, 2048) == 4_096_000
    assert parse_duration("0 steps").samples(None, 2048) == 0
    assert parse_duration("1.5 epochs").samples(1000, 100) == 1500


def test_epochs_need_a_known_epoch() -> None:
    with pytest.raises(ValueError, match='duration "2 epochs": the number of samples per epoch is not known'):
        parse_duration("2 epochs").steps(None, 100)
    assert parse_duration("2 steps").steps(None, 100) == 2
