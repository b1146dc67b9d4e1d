"""The recipes that come with cmpt."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cmpt.recipe import check_recipe, load_recipe, phases, to_yaml
from cmpt.recipe.paths import resolve_path
from cmpt.recipe.schema import Masking, Recipe
from cmpt.recipe.typed import flat, plain

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RUNS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "base.yaml")
ABOUT_FILES = ("data.train.", "data.heldout", "tokenizer.path", "phases.0.set.text_masking.frequencies")


def load(name: str) -> Recipe:
    return load_recipe(str(FOLDER / name)).recipe


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RUNS}
    assert names >= {"quickstart", "vitb16_cc12m", "vitb16_cc12m_flip", "vitb16_cc12m_clip", "vitl14_laion"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 8])
def test_it_loads_and_lacks_at_most_its_files(
    path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(str(path))
    faults = check_recipe(loaded.recipe, world_size, loaded.origins)
    assert [fault for fault in faults if not fault.startswith(ABOUT_FILES)] == []


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_placeholder_paths_are_told_with_the_way_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(path)).recipe
    if recipe.data.train[0].urls[0].startswith("pkg:"):
        pytest.skip("its shards come with cmpt")
    (fault,) = [fault for fault in check_recipe(recipe) if fault.startswith("data.train.")]
    assert "shards do not exist" in fault and "give your own: data.train.0.urls=[...]" in fault


def test_quickstart_runs_from_any_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load("quickstart.yaml")
    assert check_recipe(recipe) == []
    assert Path(resolve_path(recipe.data.train[0].urls[0])).is_absolute()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_survives_being_saved(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path)).recipe
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(saved)).recipe == recipe


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_its_header_says_command_hardware_hours_and_result(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = "".join(line for line in text.splitlines(keepends=True)[:20] if line.startswith("#"))
    for part in ("Command:", f"recipes/{path.name}", "Hardware:", "Hours:", "Expected:", "measured"):
        assert part in header, part


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_it_states_only_what_differs_from_its_base(path: Path) -> None:
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = load_recipe(str(FOLDER / own.pop("extends")))
    inherited = flat(plain(base.recipe))
    for key, value in flat(own).items():
        stated = base.origins.get(key, "schema default") != "schema default"
        assert not stated or inherited[key] != value, f"{key}: {value} is its base's value"


def test_the_paper_s_setting_is_what_the_paper_says() -> None:
    """arXiv 2405.08815, section 4.1, RGB_0.3."""
    recipe = load("vitb16_cc12m.yaml")
    assert recipe.masking == Masking("cluster", ratio=0.5, anchor_ratio=0.03, min_ratio=0.3, threshold=None)
    assert (recipe.run.duration, recipe.engine.batch_size) == ("32 epochs", 2048)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.2)
    assert (optimizer.warmup, optimizer.min_lr, optimizer.clip_norm) == ("2000 steps", 0.0, None)
    assert (recipe.image.size, recipe.image.crop_scale, recipe.image.flip) == (224, (0.9, 1.0), False)
    model = recipe.model
    assert (model.patch_size, model.embed_dim, model.vision.width, model.vision.layers) == (16, 512, 768, 12)
    assert (model.text.width, model.text.layers, model.text.heads, model.context_length) == (512, 12, 8, 77)
    assert (model.temperature_init, model.logit_scale_max) == (0.07, 100.0)


@pytest.mark.parametrize(
    ("name", "strategy"), [("vitb16_cc12m_flip.yaml", "random"), ("vitb16_cc12m_clip.yaml", "none")]
)
def test_a_baseline_differs_from_the_paper_s_setting_in_the_strategy_alone(name: str, strategy: str) -> None:
    ours, theirs = flat(plain(load("vitb16_cc12m.yaml"))), flat(plain(load(name)))
    assert {key for key in ours if ours[key] != theirs[key]} == {"run.name", "masking.strategy"}
    assert theirs["masking.strategy"] == strategy and theirs["masking.ratio"] == 0.5


def test_laion_ends_with_a_short_unmasked_phase() -> None:
    masked, unmasked = phases(load("vitl14_laion.yaml"))
    assert (masked.masking.strategy, unmasked.masking.strategy) == ("cluster", "none")
    assert masked.duration.samples(None, 32768) == 12.8e9
    assert unmasked.duration.samples(None, 32768) < 0.02 * masked.duration.samples(None, 32768)
    assert unmasked.optimizer.lr < masked.optimizer.lr
