"""The masking study: its arms are recipes, its tables hold what one computes by hand, and nothing is trained twice."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image as Pillow
from test_train import TINY

import compare_masking
from cmpt.masking.patches import Pixels
from cmpt.recipe import check_recipe, load_recipe, phases
from compare_masking import Study, StudyError, main, own_arm, parse
from mask_views import is_background
from masking_arms import (
    ARMS,
    Background,
    background_of,
    background_shares,
    half_the_patches,
    overrides_of,
)
from masking_results import COSTS, RESULTS, Result, background_table, by_arm, draw, load, read_run, table, title

RECIPE = "recipes/quickstart.yaml"
TOKENS = {"none": 144.0, "grid": 36.0, "resize": 64.0}  # of the others 72


def result(mode: str, arm: str, seed: int, recall: float, steps: int = 130) -> Result:
    image_tokens = TOKENS.get(arm, 72.0)
    costs = {
        "mask_ratio": 0.0 if arm in ("none", "resize") else 1 - image_tokens / 144,
        "image_tokens_per_sample": image_tokens,
        "text_tokens_per_sample": 5.8 if "frequency" in arm else 7.9,
        "flops_per_sample": image_tokens * 3e7,
    }
    figures = dict.fromkeys(RESULTS, recall) | {"zero_shot_top1": 0.1 + seed / 10}
    chance = dict.fromkeys(RESULTS, 0.002) | {"image_to_text_r10": 0.02, "text_to_image_r10": 0.02}
    return Result(mode, 120.0 if mode == "time" else 12800, arm, seed, steps, figures | costs, chance)


TIMED = [
    *(
        result("time", arm, seed, base + seed / 100)
        for arm, base in (("none", 0.1), ("cluster", 0.2))
        for seed in (0, 1)
    )
]


def overrides(arm: str, steps: int = 7) -> list[str]:
    return overrides_of(ARMS[arm], arm, steps, 6, load_recipe(RECIPE).recipe)


@pytest.mark.parametrize("recipe", [RECIPE, "recipes/vitb16_cc12m_clipf.yaml", "recipes/vitb16_cc12m_embedding.yaml"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_one_phase_of_a_recipe_that_can_run(arm: str, recipe: str) -> None:
    """Whatever masks and phases the recipe has of its own."""
    clipart = ["data.train=[{urls: ['pkg:data/clipart/train-{0000..0007}.tar']}]"]
    base = load_recipe(recipe, clipart).recipe
    loaded = load_recipe(recipe, [*clipart, *overrides_of(ARMS[arm], arm, 7, 6, base)])
    assert [fault for fault in check_recipe(loaded.recipe) if "tokenizer" not in fault] == []
    (phase,) = phases(loaded.recipe)
    assert phase.duration.amount == 7 and phase.masking.embedding_share == 0
    if arm.startswith("cluster"):
        assert (phase.masking.strategy, phase.masking.ratio, phase.masking.min_ratio) == ("cluster", 0.5, 0.3)
        assert phase.masking.embedding_share_end == (1.0 if arm == "cluster-embedding" else None)
    assert phase.text_masking.tokens == (6 if arm.endswith("+frequency") else None)


def test_resize_has_nearly_half_the_patches_and_is_evaluated_at_full_size() -> None:
    base = load_recipe(RECIPE).recipe
    assert half_the_patches(base) == 64  # 64 patches are 8 from half of 144, those of 72 pixels, 81, are 9
    resized = load_recipe(RECIPE, overrides("resize")).recipe
    assert phases(resized)[0].image.size == 64 and resized.image.size == 96
    base.image.size, base.model.patch_size = 224, 16
    assert half_the_patches(base) == 160  # 100 of 196


def test_arms_of_ones_own() -> None:
    assert own_arm("a:masking.ratio=0.6,image.crop_scale=[0.5, 1.0]") == (
        "a",
        ["masking.ratio=0.6", "image.crop_scale=[0.5, 1.0]"],
    )
    assert own_arm("b:text_masking={strategy: random, tokens: 6},run.seed=3")[1][1] == "run.seed=3"
    for wrong in ("a", "a:", ":b=1", "none:masking.ratio=0.5"):
        with pytest.raises(StudyError):
            own_arm(wrong)


def test_what_a_user_gets_wrong_is_said_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = [RECIPE, "--folder", str(tmp_path), "--seconds", "1"]
    for wrong, code, told in (
        (["--arms", "clustr"], 1, "error: --arms clustr: expected one of none, cluster"),
        (["--arms", "none", "none"], 1, "every name may be there once"),
        (["--arms", "none", "--arm", "mine:masking.ratio=2"], 1, "arm mine: masking.ratio = 2.0: must be >= 0 and < 1"),
        (["--samples", "100"], 1, "--samples 100: must be at least a batch, 128"),
        (["masking.rato=2"], 2, "masking.ratio"),
        (["--report-only"], 1, "results.json: no results"),
    ):
        assert main([*folder, *wrong]) == code
        assert told in capsys.readouterr().err
    for wrong in (["--measure-steps", "10"], ["--seconds", "-1"]):
        with pytest.raises(SystemExit):
            parse([*folder, *wrong])


def test_tables_hold_means_and_spreads() -> None:
    assert list(by_arm(TIMED)) == ["cluster", "none"]  # the best first
    assert title(TIMED) == "Equal time: 120 s of training, 2 seeds"
    lines = table(TIMED, {"none": 1.284, "cluster": 0.9}).splitlines()
    # 20 and 21 %: mean 20.5, deviation 0.7; zero-shot 10 and 20 %.
    cells = "20.5 ± 0.7 | 20.5 ± 0.7 | 20.5 ± 0.7 | 20.5 ± 0.7 | 15.0 ± 7.1 |"
    assert lines[2] == "| cluster | 0.90 | 130 | 50 % | 72 | 7.9 | 2.16 | " + cells
    assert lines[3].startswith("| none | 1.28 | 130 | 0 % | 144 | 7.9 | 4.32 | 10.5 ± 0.7 |")
    assert lines[4] == "| chance | | | | | | | 2.0 | 2.0 | 0.2 | 0.2 | 0.2 |"
    assert {line.count("|") for line in lines} == {13}
    alone = [result("samples", "none", 0, 0.3)]
    assert title(alone) == "Equal samples: 12,800 pairs, 1 seed"
    assert title([*TIMED, result("time", "grid", 0, 0.1)]).endswith("1 to 2 seeds")
    assert "| 30.0 | 30.0 |" in table(alone, {"none": 1.0})
    shares = {"a": Background(0.25, 0.5), "b": Background(0.25, None), "c": Background(0.25, None, True)}
    assert background_table(shares).splitlines()[2:] == [
        "| a | 25 % | 50 % |",
        "| b | 25 % | nothing is hidden |",
        "| c | 25 % | by the weights, not known |",
    ]


def test_a_run_is_read_by_the_steps_of_its_rows(tmp_path: Path) -> None:
    costs = dict.fromkeys(COSTS, 1.0)
    rows = [{"step": 1, **costs}, {"step": 10, **dict.fromkeys(costs, 2.0)}, {"step": 12, **dict.fromkeys(costs, 5.0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = dict.fromkeys(RESULTS, 0.2) | {"pairs": 500, "classes": 8}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(last | {"zero_shot_top1": 0}) + "\n" + json.dumps(last))
    figures, chance = read_run(tmp_path)
    assert figures["mask_ratio"] == (1 * 1 + 9 * 2 + 2 * 5) / 12 and figures["zero_shot_top1"] == 0.2
    assert [chance[key] for key in RESULTS] == [0.02, 0.02, 0.002, 0.002, 0.125]
    del last["zero_shot_top1"]  # pairs without categories
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(last))
    assert "zero_shot_top1" not in read_run(tmp_path)[1]


def test_the_picture_has_a_panel_for_each_comparison(tmp_path: Path) -> None:
    recalls = (0.185, 0.188, 0.19, 0.224, 0.215, 0.205, 0.19, 0.226, 0.186, 0.222)
    seconds = dict(zip(ARMS, (1.28, 0.92, 1.0, 0.72, 0.72, 0.72, 0.5, 0.66, 0.9, 0.7), strict=True))
    timed, seen = [], []
    for number, (arm, recall) in enumerate(zip(ARMS, recalls, strict=True)):
        for seed in range(3):
            noise = (number * 7 + seed * 5) % 11 / 400
            timed.append(result("time", arm, seed, recall + noise, round(120 / seconds[arm])))
            seen.append(result("samples", arm, seed, recall + noise + (0.02 if arm == "none" else -0.03), 100))
    sizes = []
    for name, comparisons in (("both", [timed, seen]), ("one", [timed])):
        draw(comparisons, seconds, tmp_path / f"{name}.png")
        with Pillow.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").resize((200, 100)).getcolors(20_000) or []) > 50
            sizes.append(picture.size)
    assert sizes[0] == (2 * sizes[1][0], sizes[1][1])


def test_background_is_white_throughout_and_hidden_patches_are_counted() -> None:
    images = torch.full((1, 3, 8, 24), 250, dtype=torch.uint8)
    images[0, 1, 3, 9] = 246  # more than 8 levels below white
    images[0, :, :, 16:] = 30
    assert is_background(Pixels(images, 8)).tolist() == [[True, False, False]]
    recipe = load_recipe(RECIPE, overrides("none")).recipe
    images_BCHW, ordinal_B = images.repeat(40, 1, 1, 1), torch.arange(40)
    (phase,) = phases(recipe)
    assert background_of(images_BCHW, ordinal_B, recipe, phase) == Background(pytest.approx(1 / 3), None)
    (phase,) = phases(load_recipe(RECIPE, [*overrides("random"), "masking.ratio=0.34"]).recipe)  # one of three stays
    share = background_of(images_BCHW, ordinal_B, recipe, phase).of_hidden
    assert share is not None and 0.15 < share < 0.55
    (phase,) = phases(load_recipe(RECIPE, overrides("cluster-embedding")).recipe)
    assert background_of(images_BCHW, ordinal_B, recipe, phase).needs_weights


def test_random_masks_hide_as_much_background_as_there_is_and_clusters_more() -> None:
    """On the clip art, a quarter of whose patches hold nothing."""
    arms = ("random", "cluster", "resize", "cluster-embedding")
    recipes = {arm: load_recipe(RECIPE, ["engine.batch_size=64", *overrides(arm)]).recipe for arm in arms}
    shares = background_shares(recipes, 256)
    by_chance, clusters = shares["random"], shares["cluster"]
    assert by_chance.of_hidden == pytest.approx(by_chance.of_all, abs=0.02)
    assert clusters.of_all == by_chance.of_all
    assert clusters.of_hidden is not None and clusters.of_hidden > by_chance.of_all + 0.02
    assert shares["resize"].of_hidden is None and not shares["resize"].needs_weights


class FakeTraining:
    """Stands for subprocess.run: leaves what a run would, at once. Arm `slow` takes 0.4 s a step, others 0.25 s."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fails_at: str | None = None

    def __call__(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        given = dict(part.split("=", 1) for part in command if "=" in part)
        name, folder = given["run.name"], Path(given["run.folder"]) / given["run.name"]
        self.names.append(name)
        if name == self.fails_at:
            return subprocess.CompletedProcess(list(command), 3, "", "much before\n" * 20 + "error: out of luck")
        (folder / "checkpoints" / "step_00000001").mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("")  # of no consequence: `conflict` is away
        steps = int(given["run.duration"].split()[0])
        row = dict.fromkeys(COSTS, 1.0) | {"step_s": 0.4 if "slow" in name else 0.25}
        rows = [row | {"step": step + 1, "step_s": row["step_s"] if step >= 10 else 9.0} for step in range(steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        last = dict.fromkeys(RESULTS, int(given["run.seed"]) / 10) | {"pairs": 500, "classes": 8, "step": steps}
        (folder / "evaluations.jsonl").write_text("" if name.startswith("speed") else json.dumps(last) + "\n")
        return subprocess.CompletedProcess(list(command), 0, "", "")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(compare_masking.subprocess, "run", fake)
    monkeypatch.setattr(compare_masking, "conflict", lambda recipe: None)
    monkeypatch.setattr(compare_masking, "background_shares", lambda recipes, count: {})
    return fake


def test_steps_follow_from_step_times_that_arms_take_in_turns(training: FakeTraining, tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path), "--arms", "random", "--arm", "slow:masking.strategy=none", "--seeds", "1", "2"]
    assert main([RECIPE, *folder, "--seconds", "10", "--samples", "3200"]) == 0
    assert training.names[:6] == [f"speed-{arm}-{repeat}" for repeat in range(3) for arm in ("random", "slow")]
    assert training.names[6:] == [
        name
        for seed in (1, 2)
        for name in (
            f"random-40steps-seed{seed}",
            f"random-25steps-seed{seed}",
            f"slow-25steps-seed{seed}",  # as many steps in both comparisons: one run
        )
    ]
    assert len(load(tmp_path / "results.json")) == 8


def test_a_second_start_makes_only_what_is_not_there(
    training: FakeTraining, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = [RECIPE, "--folder", str(tmp_path), "--arms", "none", "random"]
    training.fails_at = "random-40steps-seed1"
    assert main([*folder, "--seconds", "10", "--seeds", "0", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: random-40steps-seed1 ended with 3:\n") and error.endswith("error: out of luck\n")
    assert len(error.splitlines()) == 9
    assert len(load(tmp_path / "results.json")) == 3
    assert not list(tmp_path.glob("speed-*/checkpoints"))
    training.fails_at, training.names = None, []
    assert main([*folder, "--seconds", "10", "--seeds", "0", "1"]) == 0
    assert training.names == ["random-40steps-seed1"]
    assert "1 runs to make" in capsys.readouterr().out

    # Another comparison keeps the first one, which a report without an amount shows beside it.
    assert main([*folder, "--samples", "1280", "--seeds", "0"]) == 0
    assert training.names[1:] == ["none-10steps-seed0", "random-10steps-seed0"]
    told = capsys.readouterr().out
    assert "Equal time: 10 s of training, 2 seeds" in told and "Equal samples: 1,280 pairs, 1 seed" in told
    before, training.names = (tmp_path / "results.json").read_bytes(), []
    assert main([*folder, "--report-only", "--samples", "1280"]) == 0
    assert capsys.readouterr().out.strip().endswith("compare_masking.png")
    assert training.names == [] and (tmp_path / "results.json").read_bytes() == before
    assert main([*folder, "--report-only", "--seconds", "77"]) == 0, "the other mode is still there"
    assert main([*folder, "--seconds", "10", "optimizer.lr=1e-4"]) == 1
    assert "step times of none in another recipe" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_study_from_start_to_report_and_again_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = [setting for setting in TINY if not setting.startswith(("run.duration", "evaluation.every", "data.heldout"))]
    settings = [RECIPE, *tiny, f"data.cache_folder={tmp_path}/cache", "--folder", str(tmp_path / "study")]
    settings += ["--seeds", "0", "--arms", "resize", "--measure-steps", "12", "--measure-repeats", "1"]
    assert main([*settings, "--samples", "256"]) == 0
    told = capsys.readouterr().out
    assert "Equal samples: 256 pairs" in told and "| resize |" in told
    (row,) = json.loads((tmp_path / "study" / "results.json").read_text())
    assert row["steps"] == 8 and row["figures"]["image_tokens_per_sample"] == 9.0
    assert (tmp_path / "study" / "compare_masking.png").stat().st_size > 10_000
    (seconds,) = Study(parse([*settings, "--samples", "256"])).measure().values()

    def train_again(*arguments: object, **options: object) -> None:
        raise AssertionError("everything is there")

    monkeypatch.setattr(compare_masking.subprocess, "run", train_again)
    assert main([*settings, "--samples", "256", "--seconds", str(8 * seconds)]) == 0, "8 steps: the same run"
    timed, seen = json.loads((tmp_path / "study" / "results.json").read_text())
    assert seen == row and timed["mode"] == "time" and timed["figures"] == row["figures"]
    assert main([*settings, "--samples", "256", "optimizer.eps=1e-7"]) == 1, "a recipe that is not that of the runs"
