"""Study files: what they may say, what they may not, and the points that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from small_studies import study, study_file

import scaling
from cmpt.recipe import RecipeError
from scaling_study import DECIDED, Study, describe, load_study, point_recipe, study_hosts, study_points


def names(of: Study) -> list[str]:
    return [point.name for point in study_points(of, study_hosts(of))]


def test_a_point_for_every_world_size_batch_and_swept_value(tmp_path: Path) -> None:
    assert names(study(tmp_path, strong=[64])) == [
        "weak-1x1-batch16-zero_stage1",
        "strong-1x1-batch64-zero_stage1",
        "weak-1x1-batch16-zero_stage3",
        "strong-1x1-batch64-zero_stage3",
        "weak-1x2-batch32-zero_stage1",
        "strong-1x2-batch64-zero_stage1",
        "weak-1x2-batch32-zero_stage3",
        "strong-1x2-batch64-zero_stage3",
    ]


def test_swept_keys_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    swept = {"model.text.layers": [1, 2], "model.vision.layers": [1, 2]}
    found = study_points(study(tmp_path, processes=[1], sweep=swept), {})
    assert found[1].name == "weak-1x1-batch16-model.text.layers1-model.vision.layers2"
    assert describe(found[1].settings) == "model.text.layers 1, model.vision.layers 2"


@pytest.mark.parametrize("name", ["processes.yaml", "nodes.yaml"])
def test_the_studies_of_the_recipes_have_points(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    of = load_study(f"recipes/scaling/{name}")
    if of.hostfile is not None:
        of.hostfile = str(tmp_path / "hostfile")
        Path(of.hostfile).write_text("".join(f"n{number} slots=8\n" for number in range(16)))
        of.overrides += [f"data.train.0.urls=[{REPOSITORY / 'cmpt/data/clipart/train-0000.tar'}]"]
    assert len(study_points(of, study_hosts(of))) == {"processes.yaml": 18, "nodes.yaml": 30}[name]


def test_points_take_the_first_hosts_of_the_hostfile_and_as_many_slots_as_all_have(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=8\nb slots=4\nc slots=2\n")
    several = study(tmp_path, processes=None, hostfile=str(hostfile), nodes=[1, 2], sweep=None)
    points = study_points(several, study_hosts(several))
    assert [point.include for point in points] == ["a:0,1,2,3,4,5,6,7", "a:0,1,2,3@b:0,1,2,3"]
    assert [(point.world_size, point.batch_size) for point in points] == [(8, 128), (8, 128)]
    fewer = study(tmp_path, processes=None, hostfile=str(hostfile), nodes=[2], processes_per_node=2, sweep=None)
    assert study_points(fewer, study_hosts(fewer))[0].include == "a:0,1@b:0,1"


def test_a_point_trains_the_recipe_without_what_is_not_training(tmp_path: Path) -> None:
    given = study(tmp_path, overrides=["masking.ratio=0.6"], warmup_steps=3, measured_steps=6)
    point = study_points(given, {})[-1]
    recipe = point_recipe(given, point, repeat=2).recipe
    assert recipe.masking.ratio == 0.6 and recipe.engine.zero_stage == 3 and recipe.engine.batch_size == 32
    assert recipe.run.timings and recipe.run.stop_after == "10 steps", "one more, in which the run ends"
    assert recipe.run.name == f"{point.name}-r2" and recipe.data.heldout == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"processes": None}, ["processes", "the study has no points"]),
        ({"weak": None}, ["weak", "the study has no points"]),
        ({"nodes": [1]}, ["processes", "not both"]),
        ({"processes": None, "nodes": [2]}, ["nodes", "needs hostfile"]),
        ({"hostfile": "hosts"}, ["processes", "with a hostfile give nodes"]),
        ({"recipe": None}, ["recipe", "must be given"]),
        ({"proceses": [1]}, ["proceses", "unknown key", "did you mean processes?"]),
        ({"processes": [0]}, ["processes", "[0]", "at least 1"]),
        ({"processes": "two"}, ["processes", '"two"', "a list of whole numbers"]),
        ({"measured_steps": 2}, ["measured_steps = 2", "at least 4"]),
        ({"timeout_minutes": 0}, ["timeout_minutes", "above 0"]),
        ({"sweep": {"engine.zero_stage": 1}}, ["sweep.engine.zero_stage", "a list of values"]),
        ({"sweep": {"engine.batch_size": [8]}}, ["sweep.engine.batch_size", "[8]", "weak and strong"]),
        ({"overrides": ["run.name=x"]}, ["overrides", "run.name=x", "decided by the study"]),
        ({"environment": {"A": None}}, ["environment.A"]),
        ({"name": "a b"}, ["name", "letters"]),
        ({"name": ".."}, ["name", "not . first"]),
        ({"timeout_minutes": float("nan")}, ["timeout_minutes", "above 0, and finite"]),
        ({"collectives_seconds": float("inf")}, ["collectives_seconds", "above 0, and finite"]),
        ({"sweep": {"engine.zero_stage": [1, 2, 1]}}, ["sweep.engine.zero_stage", "1 more than once"]),
    ],
)
def test_a_bad_study_is_refused_with_field_value_and_constraint(
    keys: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        study(tmp_path, **keys)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"sweep": {"engine.zero_stages": [1]}}, ["engine.zero_stages", "did you mean engine.zero_stage?"]),
        ({"sweep": {"engine.zero_stage": [1, 4]}}, ["zero_stage4", "engine.zero_stage = 4", "<= 3", "(the study)"]),
        ({"sweep": {"data.image_key": ["a/b", "a:b"]}}, ["sweep", "two points have the name", "image_keya_b"]),
        ({"processes": [3]}, ["weak-1x3-batch48", "3"]),
        ({"weak": [15], "processes": [2]}, ["weak-1x2-batch30", "engine.batch_size = 30"]),
        ({"overrides": ["masking.ratio=2"]}, ["masking.ratio"]),
        ({"recipe": "nowhere.yaml"}, ["nowhere.yaml"]),
    ],
)
def test_points_whose_recipe_cannot_run_are_refused_before_anything_starts(
    keys: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        study_points(study(tmp_path, **keys), {})
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("hostfile", "keys", "told"),
    [
        ("a slots=1\n", {"nodes": [1, 4]}, ["nodes = [1, 4]", "lists 1 host"]),
        ("a slots=1\n", {"nodes": [1], "processes_per_node": 8}, ["processes_per_node = 8", "a has 1 slots"]),
        ("a slot=1\n", {"nodes": [1]}, ["line 1", "slots=N"]),
        (None, {"nodes": [1]}, ["hostfile", "cannot be read"]),
    ],
)
def test_nodes_beyond_the_hostfile_are_refused(
    hostfile: str | None, keys: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "hostfile"
    if hostfile is not None:
        path.write_text(hostfile)
    with pytest.raises(RecipeError) as caught:
        names(study(tmp_path, processes=None, hostfile=str(path), sweep=None, **keys))
    for part in told:
        assert part in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scaling").write_text("a file where the study's folder is to be")
    path = study_file(tmp_path)
    assert scaling.main([str(path)]) == scaling.USER_ERROR
    told = capsys.readouterr().err
    assert told.startswith("error: folder = ") and str(tmp_path / "scaling") in told and "File exists" in told


def test_what_the_study_decides_is_in_every_point(tmp_path: Path) -> None:
    """So that no key of DECIDED is refused in vain, and none that is set can be swept."""
    of = study(tmp_path)
    loaded = point_recipe(of, study_points(of, {})[0])
    set_by_study = {key for key in DECIDED if loaded.origins.get(key) == "the study"}
    assert set_by_study == set(DECIDED)


def test_a_host_that_does_not_answer_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("no-such-host.invalid slots=1\n")
    path = study_file(tmp_path, processes=None, hostfile=str(hostfile), nodes=[1], sweep=None)
    assert scaling.main([str(path)]) == scaling.USER_ERROR
    told = capsys.readouterr().err
    assert "error: host no-such-host.invalid does not answer" in told
    assert not (tmp_path / "scaling").exists()


def test_a_study_file_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([str(tmp_path / "none.yaml")]) == scaling.USER_ERROR
    assert "there is no such study file" in capsys.readouterr().err
