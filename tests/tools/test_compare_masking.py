from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train import TINY

import masking_results
from cmpt.recipe import check_recipe, load_recipe
from compare_masking import Study, main
from masking_arms import ARMS, Background, background_share, half_the_patches, is_background, overrides_of
from masking_results import RESULTS, Result, background_table, by_arm, read_run, table

RECIPE = "recipes/quickstart.yaml"


def result(mode: str, arm: str, seed: int, recall: float) -> Result:
    figures = dict.fromkeys(RESULTS, recall) | {"zero_shot_top1": 0.1 + seed / 10, "chance_r10": 0.02}
    costs = {"mask_ratio": 0.5, "image_tokens_per_sample": 72.0, "text_tokens_per_sample": 7.9, "flops_per_sample": 2e9}
    return Result(mode, arm, seed, 130, figures | costs)


MADE_UP = [
    *(
        result("time", arm, seed, base + seed / 100)
        for arm, base in (("none", 0.1), ("cluster", 0.2))
        for seed in (0, 1)
    ),
    result("samples", "none", 0, 0.3),
]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_that_can_run(arm: str) -> None:
    base = load_recipe(RECIPE).recipe
    loaded = load_recipe(RECIPE, overrides_of(arm, {}, 7, base))
    assert check_recipe(loaded.recipe) == []


def test_small_images_have_nearly_half_the_patches() -> None:
    base = load_recipe(RECIPE).recipe
    assert half_the_patches(base) == 64  # 64 patches and 81 are as far from 72: the smaller comes first
    base.image.size, base.model.patch_size = 224, 16
    assert half_the_patches(base) == 160


def test_an_arm_of_ones_own_and_wrong_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path), "--seconds", "1"]
    assert main([*folder, "--arms", "clustr"]) == 1
    assert "--arms clustr: expected one of none, cluster" in capsys.readouterr().err
    assert main([*folder, "--arms", "none", "--arm", "mine:masking.ratio=2"]) == 1
    assert "arm mine: masking.ratio = 2.0: must be >= 0 and < 1" in capsys.readouterr().err
    assert main([RECIPE, "masking.rato=2", *folder]) == 2
    assert "masking.ratio" in capsys.readouterr().err
    assert main(["--folder", str(tmp_path), "--report-only"]) == 1
    assert "results.json: no such file" in capsys.readouterr().err


def test_tables_hold_means_and_spreads() -> None:
    assert list(by_arm(MADE_UP, "time")) == ["cluster", "none"]  # the best first
    lines = table(MADE_UP, "time", {"none": 1.284, "cluster": 0.9}).splitlines()
    # 20 and 21 %: mean 20.5, deviation 0.7; zero-shot 10 and 20 %.
    cells = "20.5 ± 0.7 | 20.5 ± 0.7 | 20.5 ± 0.7 | 20.5 ± 0.7 | 15.0 ± 7.1 |"
    assert lines[2] == "| cluster | 0.90 | 130 | 50 % | 72 | 7.9 | 2.00 | " + cells
    assert lines[3].startswith("| none | 1.28 | 130 |") and "10.5 ± 0.7" in lines[3]
    assert "30.0 | 30.0" in table(MADE_UP, "samples", {"none": 1.0})
    assert background_table({"cluster": Background(0.25, 0.5), "none": Background(0.25, None)}).splitlines()[2:] == [
        "| cluster | 25 % | 50 % |",
        "| none | 25 % | nothing is hidden |",
    ]


def test_a_run_is_read_by_the_steps_of_its_rows(tmp_path: Path) -> None:
    costs = dict.fromkeys(masking_results.COSTS, 1.0)
    rows = [{"step": 1, **costs}, {"step": 10, **dict.fromkeys(costs, 2.0)}, {"step": 12, **dict.fromkeys(costs, 5.0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = dict.fromkeys(RESULTS, 0.2) | {"pairs": 500}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(last | {"zero_shot_top1": 0}) + "\n" + json.dumps(last))
    found = read_run(tmp_path)
    assert found["mask_ratio"] == (1 * 1 + 9 * 2 + 2 * 5) / 12
    assert found["chance_r10"] == 0.02 and found["zero_shot_top1"] == 0.2


def test_background_is_white_throughout() -> None:
    images = torch.full((1, 3, 8, 24), 250, dtype=torch.uint8)
    images[0, 1, 3, 9] = 200
    images[0, :, :, 16:] = 30
    assert is_background(images, 8).tolist() == [[True, False, False]]


def test_random_masks_hide_as_much_background_as_there_is_and_clusters_more() -> None:
    """On the clip art, half of whose patches hold nothing."""
    overrides = ["engine.batch_size=64", "run.duration=1 steps"]
    by_chance = background_share(RECIPE, [*overrides, "masking.strategy=random"], 256)
    clusters = background_share(RECIPE, overrides, 256)
    assert by_chance.of_hidden == pytest.approx(by_chance.of_all, abs=0.02)
    assert clusters.of_all == by_chance.of_all
    assert clusters.of_hidden is not None and clusters.of_hidden > by_chance.of_all + 0.02


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_from_start_to_report_and_again_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = [setting for setting in TINY if not setting.startswith(("run.duration", "evaluation.every", "data.heldout"))]
    settings = [*tiny, f"data.cache_folder={tmp_path}/cache", "--folder", str(tmp_path / "study"), "--seeds", "0"]
    settings += ["--arms", "small images", "--measure-steps", "6", "--measure-repeats", "1"]
    settings += ["--samples", "256", "--seconds", "0.5"]
    assert main([RECIPE, *settings]) == 0
    told = capsys.readouterr().out
    assert "Equal samples: 256 pairs" in told and "Equal time: " in told and "| small images |" in told
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert {row["mode"] for row in results} == {"time", "samples"}
    assert {row["figures"]["image_tokens_per_sample"] for row in results} == {9.0}
    assert (tmp_path / "study" / "compare_masking.png").stat().st_size > 10_000

    def train(study: Study, name: str, *more: object) -> Path:
        assert (study.folder / name / "report.html").exists() and not name.startswith("speed"), "nothing is run anew"
        return study.folder / name

    monkeypatch.setattr(Study, "train", train)
    assert main([RECIPE, *settings]) == 0
    assert json.loads((tmp_path / "study" / "results.json").read_text()) == results
    assert main([RECIPE, *settings, "--report-only"]) == 0
