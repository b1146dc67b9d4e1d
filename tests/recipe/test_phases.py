from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cmpt.recipe import Duration, RecipeError, load_recipe, phases
from cmpt.recipe.schema import Image, Masking, Optimizer, Phase, Recipe, Run

ONLY = (
    "a phase sets only masking.*, text_masking.*, image.size, image.crop_scale, optimizer.lr, optimizer.min_lr and "
    "optimizer.warmup"
)


def faults_of(*listed: Phase) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        phases(Recipe(phases=list(listed)))
    return caught.value.faults


def test_without_phases_the_run_is_one_phase() -> None:
    (phase,) = phases(Recipe(run=Run(duration="3 epochs")))
    assert (phase.name, phase.duration) == ("main", Duration(3, "epochs"))
    assert (phase.masking, phase.image, phase.optimizer) == (Masking(), Image(), Optimizer())


def test_a_phase_changes_what_it_sets_and_nothing_else() -> None:
    recipe = Recipe(masking=Masking(ratio=0.6))
    recipe.phases = [
        Phase("first", "10 steps"),
        Phase(
            "second",
            "1.5 epochs",
            {
                "masking.strategy": "none",
                "masking.threshold": None,
                "image.size": 448,
                "image.crop_scale": [0.5, 1],
                "optimizer.lr": 1,
                "optimizer.min_lr": 1e-9,
                "optimizer.warmup": "5 steps",
            },
        ),
    ]
    first, second = phases(recipe)
    assert (first.masking, first.image, first.optimizer) == (recipe.masking, recipe.image, recipe.optimizer)
    assert second.duration == Duration(1.5, "epochs")
    assert second.masking == replace(recipe.masking, strategy="none")
    assert second.image == Image(size=448, crop_scale=(0.5, 1.0))
    assert second.optimizer == Optimizer(lr=1.0, min_lr=1e-9, warmup="5 steps")
    assert recipe.masking == Masking(ratio=0.6), "the recipe itself stays as it is"


def test_phases_do_not_share_their_sections() -> None:
    first, second = phases(Recipe(phases=[Phase("a", "1 steps"), Phase("b", "1 steps")]))
    first.masking.ratio = 0.9
    assert second.masking.ratio == 0.5


def test_a_phase_without_a_name_is_numbered() -> None:
    assert [phase.name for phase in phases(Recipe(phases=[Phase("", "1 steps"), Phase("b", "1 steps")]))] == [
        "phase 1",
        "b",
    ]


def test_only_the_documented_keys_can_be_set() -> None:
    wrong = {"masking.rato": 0, "image.flip": True, "run.seed": 1, "ratio": 0.1, "masking": {"ratio": 0.1}}
    assert faults_of(Phase("a", "1 steps", wrong)) == [
        f"phases.0.set.masking.rato = 0: {ONLY}; did you mean masking.ratio?",
        f"phases.0.set.image.flip = true: {ONLY}",
        f"phases.0.set.run.seed = 1: {ONLY}",
        f"phases.0.set.ratio = 0.1: {ONLY}; did you mean masking.ratio?",
        f'phases.0.set.masking = {{"ratio": 0.1}}: {ONLY}',
    ]


def test_values_are_typed_as_strictly_as_elsewhere() -> None:
    wrong = {"masking.ratio": "half", "image.size": 1.5, "image.crop_scale": [1, 2, 3], "optimizer.warmup": 5}
    assert faults_of(Phase("a", "1 steps"), Phase("b", "1 steps", wrong)) == [
        'phases.1.set.masking.ratio = "half": expected a number',
        "phases.1.set.image.size = 1.5: expected a whole number",
        "phases.1.set.image.crop_scale = [1, 2, 3]: expected a list of 2 numbers",
        'phases.1.set.optimizer.warmup = 5: expected text with a unit, such as "2000 steps"',
    ]


def test_durations_of_all_phases_are_told() -> None:
    assert faults_of(Phase("a", "3"), Phase("b", "3 epchs")) == [
        'phases.0.duration = "3": has no unit; add "epochs", "steps" or "samples"',
        'phases.1.duration = "3 epchs": unknown unit "epchs"; did you mean "epochs"?',
    ]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(run=Run(duration="1 steps"), phases=[Phase("a", "1 steps")])])
def test_a_run_has_either_a_duration_or_phases(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="exactly one of run.duration and phases must be set"):
        phases(recipe)


def test_loading_tells_a_phases_faults_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: {seed: x}\nphases:\n  - name: a\n    set:\n      image.flip: true\n      masking.ratio: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert caught.value.faults == [
        f'run.seed = "x": expected a whole number ({path}:1)',
        f"phases.0.set.image.flip = true: {ONLY} ({path}:5)",
        f'phases.0.set.masking.ratio = "x": expected a number ({path}:6)',
    ]
