"""The tool that shows masks: its pages hold what MaskStage does, its thresholds say where they come from."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunCli
from data.making import jpeg, picture, text_sample, undecodable_jpeg, write_tar
from PIL import Image as Pillow

import mask_page
import show_masks
from cmpt.data.decode import heldout_pixels
from cmpt.data.validate import examine_image
from cmpt.engine.manifest import entry
from cmpt.engine.parts import part_name, write_part
from cmpt.engine.store import Store
from cmpt.masking.cluster import (
    anchor_similarities,
    draw_anchors,
    hidden_counts,
    nearest_anchor_similarity,
)
from cmpt.masking.patches import patchify, standardise
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.monitor.pictures import HIDDEN_FILL, SCALE
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe import load_recipe, to_yaml
from cmpt.recipe.schema import Image, Masking, Phase, Recipe
from mask_drawing import LIKENESS
from mask_views import Settings, by_size, look

REPOSITORY = Path(__file__).parents[2]
RECIPE = str(REPOSITORY / "recipes/quickstart.yaml")
SMALL = ["--recipe", RECIPE, "image.size=64"]  # 8 x 8 patches of 8 pixels
SIZE, PATCH, GRID = 64, 8, 8


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    """Three files of three formats and shapes."""
    pixels = [np.concatenate([picture(n, 90, 60), picture(n + 7, 90, 60 + 20 * n)], axis=1) for n in range(3)]
    names = ["one.jpg", "two.png", "three.webp"]
    for name, pixels_HWC in zip(names, pixels, strict=True):
        Pillow.fromarray(pixels_HWC).save(tmp_path / name)
    return [str(tmp_path / name) for name in names]


def middle(path: str, size: int = SIZE) -> torch.Tensor:
    """uint8 [1, C, size, size]."""
    data = Path(path).read_bytes()
    return torch.from_numpy(heldout_pixels(data, examine_image(data, 10**8), size).copy())[None]


@dataclass
class Pages:
    """What the tool wanted to draw."""

    views: list[Any] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    captions: list[mask_page.Caption] = field(default_factory=list)


Show = Callable[..., Pages]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Calls the tool, without drawing."""

    def call(*arguments: str) -> Pages:
        pages = Pages()

        def note(view: Any, smaller_HWC: Any, settings: Settings, threshold: float, caption: Any) -> bytes:
            pages.views.append(view)
            pages.settings.append(settings)
            pages.thresholds.append(threshold)
            pages.captions.append(caption)
            return b"drawn"

        monkeypatch.setattr(show_masks, "page", note)
        assert show_masks.main([*arguments, "--out", str(tmp_path / "out")]) == 0
        return pages

    return call


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """A run's folder with checkpoints: (recipe, {step: state of the threshold controller})."""

    def make(recipe: Recipe, controls: dict[int, dict[str, Any]]) -> Path:
        folder = tmp_path / "runs" / "mine"
        store = Store(folder / "checkpoints", keep=9)
        for step, masking in controls.items():
            beside = store.beside(step)
            beside.mkdir(parents=True)
            (beside / "state.json").write_text(json.dumps({"step": step, "masking": masking}))
            store.publish(step, {"state.json": entry(beside / "state.json")})
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        return folder

    return make


def controlled(threshold: float | None, progress: float = 0.0) -> dict[str, Any]:
    return {"target": 0.5, "threshold": threshold, "gain": 0.1, "settled": 8, "progress": progress}


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, ["image.size=64", *overrides]).recipe


def greys(page_HWC: np.ndarray, corner: tuple[float, float], side: float) -> np.ndarray:
    """Which patches of a tile have the colour of hidden ones in their middle: bool [L]."""
    fill = np.array([int(HIDDEN_FILL[i : i + 2], 16) for i in (1, 3, 5)])
    places = (np.arange(GRID) + 0.5) * side / GRID
    rows, columns = ((SCALE * (corner[axis] + places)).astype(int) for axis in (1, 0))
    return (page_HWC[rows][:, columns] == fill).all(axis=-1).flatten()


def test_a_page_shows_the_masks_and_similarities_of_the_training_code(photographs, tmp_path, capsys) -> None:
    assert (
        show_masks.main([photographs[0], *SMALL, "--threshold", "0.6", "--out", str(tmp_path), "--ordinal", "7"]) == 0
    )
    drawn = np.asarray(Pillow.open(tmp_path / "one-masks.png").convert("RGB"))
    assert drawn.shape[1] == SCALE * mask_page.WIDTH
    image, patches = middle(photographs[0]), GRID * GRID
    masking = Masking(threshold=0.6)
    keep = {
        strategy: MaskStage(replace(masking, strategy=strategy, ratio=ratio), Image(), PATCH, 0)(
            image, torch.tensor([7])
        ).keep_BL[0]
        for strategy, ratio in [("cluster", 0.5), ("random", 0.5), ("centred", 0.5), ("block", 0.5), ("grid", 0.75)]
    }
    assert len({tuple(mask.tolist()) for mask in keep.values()}) == 5
    assert (greys(drawn, mask_page.large_tile(4), mask_page.LARGE) == ~keep["cluster"].numpy()).all()
    for place, mask in enumerate(keep.values()):
        assert (greys(drawn, mask_page.strategy_tile(place), mask_page.SMALL) == ~mask.numpy()).all()

    anchors_BK = draw_anchors(random_words_tensor(0, torch.tensor([7]), Purpose.ANCHORS, patches), 1)
    patches_BLP = standardise(patchify(image, PATCH), Image().mean, Image().std)
    similarity_L = anchor_similarities(patches_BLP, anchors_BK)[0, :, 0]
    x, y = mask_page.large_tile(2)
    for index in (0, 9, 33, 63):
        cell = mask_page.LARGE / GRID
        at = drawn[int(SCALE * (y + (index // GRID + 0.5) * cell)), int(SCALE * (x + (index % GRID + 0.5) * cell))]
        expected = 255 * np.array(LIKENESS(float(similarity_L[index].clamp(0, 1)))[:3])
        assert np.abs(at - expected).max() <= 2
    hidden = 100 * (1 - keep["cluster"].float().mean())
    assert f"Threshold 0.600: given with --threshold; hides {hidden:.1f} % of this image" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes_whatever_else_is_shown(photographs, tmp_path) -> None:
    given = [*SMALL, "--threshold", "0.6", "masking.anchors=9"]
    assert show_masks.main([*photographs[:2], *given, "--out", str(tmp_path / "a")]) == 0
    assert show_masks.main([photographs[1], *given, "--out", str(tmp_path / "b")]) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"one-masks.png", "two-masks.png"}
    first, second = (np.asarray(Pillow.open(tmp_path / name / "two-masks.png")) for name in ("a", "b"))
    below = SCALE * 100  # the caption above says what the threshold hides of all images
    assert (first[below:] == second[below:]).all()
    before = (tmp_path / "b/two-masks.png").read_bytes()
    assert show_masks.main([photographs[1], *given, "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b/two-masks.png").read_bytes() == before


def test_another_ordinal_has_other_draws_and_the_run_seed_counts(photographs, show) -> None:
    drawn = [show(photographs[0], *SMALL, *more).views[0] for more in ([], ["--ordinal", "1"], ["run.seed=1"])]
    assert len({tuple(view.keep["random"].tolist()) for view in drawn}) == 3
    assert len({tuple(view.anchors) for view in drawn}) == 3


def test_several_images_share_a_threshold_that_holds_their_mean_at_the_target(photographs, show, capsys) -> None:
    ratio = 0.4
    pages = show(*photographs, *SMALL, f"masking.ratio={ratio}", "masking.min_ratio=0.1")
    images_BCHW = torch.cat([middle(path) for path in photographs])
    anchors_BK = draw_anchors(random_words_tensor(0, torch.zeros(3, dtype=torch.long), Purpose.ANCHORS, 64), 1)
    patches_BLP = standardise(patchify(images_BCHW, PATCH), Image().mean, Image().std)
    similarity_BL = nearest_anchor_similarity(anchor_similarities(patches_BLP, anchors_BK), anchors_BK)

    def mean_ratio(threshold: float) -> float:
        return float(hidden_counts(similarity_BL, threshold, 0.1).sum()) / similarity_BL.numel()

    (threshold,) = set(pages.thresholds)
    assert mean_ratio(threshold - 1e-3) >= ratio >= mean_ratio(threshold + 1e-3)
    told = pages.captions[0].threshold
    assert told.startswith(f"Threshold {threshold:.3f}: fitted to these 3 images, masking.ratio = 0.4; ")
    assert f"hides {100 * mean_ratio(threshold):.1f} %" in told and told in capsys.readouterr().out
    alone = show(photographs[0], *SMALL)
    assert "fitted to this image alone" in alone.captions[0].threshold and alone.thresholds != [threshold]


def test_a_recipe_can_fix_the_threshold(photographs, show) -> None:
    pages = show(photographs[0], *SMALL, "masking.threshold=0.25")
    assert pages.thresholds == [0.25] and "0.250: masking.threshold of the recipe" in pages.captions[0].threshold


def test_a_run_gives_recipe_and_threshold_of_its_newest_sound_checkpoint(photographs, run, show) -> None:
    folder = run(quickstart("masking.anchors=3"), {100: controlled(0.7), 200: controlled(0.65), 300: controlled(0.6)})
    with (folder / "checkpoints/step_00000300/state.json").open("a") as file:
        file.write(" ")
    pages = show(photographs[0], "--run", str(folder))
    assert pages.thresholds == [0.65] and len(pages.views[0].anchors) == 3
    assert "0.650: of mine/checkpoints/step_00000200; hides" in pages.captions[0].threshold


@pytest.mark.parametrize(("step", "image_size"), [(100, 64), (200, 96)])
def test_a_run_is_shown_as_in_the_phase_of_its_checkpoint(step, image_size, photographs, run, show) -> None:
    moving = {"image.size": 64, "masking.ratio": 0.7, "masking.ratio_end": 0.5, "masking.min_ratio_end": 0.4}
    phases = [Phase("small", "150 steps", moving), Phase("large", "50 steps", {"masking.anchors": 5})]
    recipe = replace(load_recipe(RECIPE, ["run.duration=null"]).recipe, phases=phases)
    folder = run(recipe, {step: controlled(0.5, progress=0.25 if step == 100 else 0.0)})
    rows = [{"step": 1, "phase": "small"}, {"step": 100, "phase": "small"}, {"step": 160, "phase": "large"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (settings,) = show(photographs[0], "--run", str(folder)).settings
    assert settings.image.size == image_size
    if step == 100:  # a quarter of the way from 0.7 to 0.5
        assert settings.masking.ratio == pytest.approx(0.65) and settings.masking.min_ratio == pytest.approx(0.325)
    else:
        assert settings.masking.anchors == 5
    (settings,) = show(photographs[0], "--run", str(folder), "--phase", "small", "--progress", "1").settings
    assert settings.masking.ratio == 0.5 and settings.masking.ratio_end is None and settings.image.size == 64


def test_embeddings_are_those_of_the_checkpoint(photographs, run, show, capsys) -> None:
    arguments = ["masking.embedding_share=1", "model.vocab_size=4096", "model.vision.layers=1", "model.text.layers=1"]
    recipe = quickstart(*arguments)
    torch.manual_seed(0)
    clip = CLIP(recipe.model, recipe.image.size)
    for parameter in clip.parameters():
        torch.nn.init.normal_(parameter)
    parameters = {name: parameter.detach() for name, parameter in clip.named_parameters()}
    folder = run(recipe, {1: controlled(0.1)})
    store, part = Store(folder / "checkpoints", keep=9), part_name(0, 1)
    beside = store.beside(5)
    beside.mkdir(parents=True)
    write_part(
        beside / part, dict.fromkeys(parameters, 0), {"param": [value.flatten() for value in parameters.values()]}
    )
    shapes = {name: list(value.shape) for name, value in parameters.items()}
    state = {"step": 5, "masking": controlled(0.1), "image_size": 64, "parameters": shapes}
    (beside / "state.json").write_text(json.dumps(state))
    store.publish(5, {name: entry(beside / name) for name in (part, "state.json")})

    (view,) = show(photographs[0], "--run", str(folder)).views
    weight = clip.visual.patch_embedding.weight.detach()
    masking = replace(recipe.masking, threshold=0.1)
    stage = MaskStage(masking, recipe.image, PATCH, 0, embed=lambda patches_BLP, grid: patches_BLP @ weight.T)
    expected = stage(middle(photographs[0]), torch.tensor([0])).keep_BL[0].numpy()
    assert (view.keep["cluster"] == expected).all()
    plain = show(photographs[0], "--run", str(folder), "masking.embedding_share=0").views[0]
    assert (plain.keep["cluster"] != expected).any()
    assert show_masks.main([photographs[0], "--run", str(folder), "model.patch_size=16"]) == 2
    assert "model.patch_size: cannot be overridden" in capsys.readouterr().err


def test_a_shard_gives_its_first_images_or_with_a_seed_others(tmp_path, show, capsys) -> None:
    samples = [text_sample(number) for number in range(12)]
    samples[1] = ("000001", {"jpg": b"no picture"})
    samples[2] = ("000002", {"txt": b"no picture"})
    samples[3] = ("000003", {"jpg": undecodable_jpeg(3)})
    samples[4] = ("folder/000004", {"png": b"", "webp": b"", "jpg": jpeg(4)})
    shard = write_tar(tmp_path / "shard.tar", samples)

    def titles(*more: str) -> list[str]:
        return [caption.title for caption in show(str(shard), *SMALL, "--count", "3", *more).captions]

    assert titles() == ["shard.tar/000000", "shard.tar/folder_000004", "shard.tar/000005"]
    told = capsys.readouterr().out
    for number, cause in ((1, "unknown_signature"), (2, "missing_image"), (3, "decode_failed")):
        assert f"shard.tar/{number:06d}: left out, {cause}" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "000000-masks.png", "folder_000004-masks.png", "000005-masks.png"
    }  # fmt: skip
    seeds = [titles("--seed", str(seed)) for seed in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1] and len({*seeds[0]}) == 3 and titles() not in seeds
    with tarfile.open(shard) as archive:
        stored = archive.extractfile("000000.jpg")
        assert stored is not None
        pixels = heldout_pixels(stored.read(), examine_image(jpeg(0), 10**8), SIZE)
    (view,) = show(str(shard), *SMALL, "--count", "1").views
    assert (view.image_HWC.transpose(2, 0, 1) == pixels).all()


def test_files_of_one_name_are_all_written(tmp_path, show) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same=x.jpg").write_bytes(jpeg(1))
    show(*(str(tmp_path / folder / "same=x.jpg") for folder in "abc"), *SMALL)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "same=x-masks.png", "same=x-2-masks.png", "same=x-3-masks.png"
    }  # fmt: skip


def test_background_is_what_is_all_nearly_white(tmp_path, show, capsys) -> None:
    pixels = np.full((SIZE, SIZE, 3), 247, dtype=np.uint8)  # 8 levels below white
    pixels[32:] = np.random.default_rng(0).integers(0, 200, (32, SIZE, 3))
    pixels[3, 3] = 246
    Pillow.fromarray(pixels).save(tmp_path / "half.png")
    (view,) = show(str(tmp_path / "half.png"), *SMALL, "masking.min_ratio=0.5").views
    white_L = np.arange(64) // GRID < 4
    white_L[0] = False
    assert (view.background_L == white_L).all()
    shares = [white_L[~view.keep[strategy]].mean() for strategy in ("cluster", "random")]
    assert (
        f"half.png: 48.4 % white background; of the hidden patches: cluster {100 * shares[0]:.1f} %, "
        f"random {100 * shares[1]:.1f} % -> "
    ) in capsys.readouterr().out


def test_every_patch_is_hidden_by_clusters_by_drops_or_kept() -> None:
    images_BCHW = torch.from_numpy(np.stack([picture(n, 64, 64) for n in range(4)])).permute(0, 3, 1, 2).contiguous()
    settings = Settings(Masking(ratio=0.5, anchors=4, min_ratio=0.45), Image(size=64), PATCH, 3, 5)
    threshold, views = look(images_BCHW, settings)
    assert any(view.extra_drops for view in views) and not all(view.extra_drops for view in views)
    for view in views:
        in_cluster_L = view.similarity_L > threshold
        assert (in_cluster_L == (np.array(view.cluster_L) >= 0)).all()
        assert not (view.keep["cluster"] & in_cluster_L).any()
        assert view.extra_drops == (~view.keep["cluster"]).sum() - in_cluster_L.sum()
        sizes = [view.cluster_size(k) for k in range(4)]
        assert sizes == sorted(sizes, reverse=True) and min(sizes) >= 1
        assert [view.cluster_L[anchor] for anchor in view.anchors] == [0, 1, 2, 3]
        assert np.allclose(view.similarity_KL.max(axis=0), view.similarity_L, atol=1e-5)
    assert by_size([2, -1, 1, 2, 0, 2, 1], 3) == ([2, 1, 0], [0, -1, 1, 0, 2, 0, 1])


def test_strategies_are_compared_at_the_ratio_of_a_recipe_that_does_not_cluster(photographs, show) -> None:
    pages = show(photographs[0], *SMALL, "masking.strategy=random", "masking.ratio=0.25", "masking.min_ratio=0.5")
    hidden = {strategy: 1 - keep.mean() for strategy, keep in pages.views[0].keep.items()}
    assert hidden.pop("grid") == 0.75
    assert hidden == pytest.approx(dict.fromkeys(["cluster", "random", "centred", "block"], 0.25), abs=1 / 64)
    smaller = Settings(Masking(ratio=0.75), Image(size=64), PATCH, 0, 0)
    assert smaller.smaller_size == 32 and replace(smaller, masking=Masking(ratio=0.99)).smaller_size == PATCH
    assert replace(smaller, masking=Masking(ratio=0.5)).smaller_size == PATCH * round(GRID * math.sqrt(0.5))


def test_scores_of_ones_own_are_shown_too(photographs, tmp_path, monkeypatch, show) -> None:
    module = "import torch\ndef upper(images, patch, ordinal): return -torch.arange(64.).expand(len(images), 64)\n"
    (tmp_path / "my_scores.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    (view,) = show(photographs[0], *SMALL, "masking.strategy=scores", "masking.scores=my_scores:upper").views
    assert list(view.keep) == ["cluster", "random", "centred", "block", "grid", "scores"]
    assert view.keep["scores"].tolist() == [True] * 32 + [False] * 32


@pytest.mark.parametrize("anchors", [1, 6, 7, 69])
def test_anchors_have_colours_of_their_own(anchors) -> None:
    colours = mask_page.colours_of(anchors)
    assert len(set(colours)) == len(colours) == anchors and all(len(colour) == 7 for colour in colours)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["missing.jpg"], "missing.jpg: no such file"),
        (["."], ".: is a folder"),
        ([str(REPOSITORY / "README.md")], "README.md: cannot be used as an image: unknown_signature"),
        (["{tmp}/broken.jpg"], "broken.jpg: cannot be used as an image: decode_failed"),
        (["{tmp}/bad.tar"], "bad.tar: holds no image that can be used; first {tmp}/bad.tar/000000: left out, missing"),
        (["{tmp}/broken.tar"], "broken.tar"),
        (["masking.ratio=0.6"], "IMAGE: give at least one"),
        (["masking.ratio=2"], "masking.ratio = 2.0: must be >= 0 and < 1 (command line)"),
        (["masking.rato=0.2"], "masking.rato = 0.2: unknown key; did you mean masking.ratio?"),
        (["image.size=65"], "image.size = 65: must be a multiple of model.patch_size = 8"),
        (["masking.strategy=scores", "masking.scores=no.such:thing"], 'masking.scores = "no.such:thing": cannot be'),
        (["masking.embedding_share=1"], "masking.embedding_share = 1: compares a model's embeddings; give --run"),
        (["--phase", "late"], "--phase: no phase 'late'; the recipe has no phases"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_before_anything_is_written(
    given, told, photographs, tmp_path, capsys
) -> None:
    (tmp_path / "broken.jpg").write_bytes(undecodable_jpeg(1))
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    write_tar(tmp_path / "bad.tar", [("000000", {"txt": b"text"})])
    given, told = [argument.format(tmp=tmp_path) for argument in given], told.format(tmp=tmp_path)
    pictures = [] if "at least one" in told else [photographs[0]]
    assert show_masks.main([*pictures, *SMALL, *given, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and told in captured.err
    assert not captured.out and not (tmp_path / "out").exists()


def test_a_run_without_a_threshold_is_refused(photographs, run, tmp_path, capsys) -> None:
    folder = run(quickstart("masking.strategy=random"), {7: controlled(None)})
    for given, told in (
        (str(folder), "step_00000007: has no threshold, masking.strategy is random; give --recipe"),
        (str(tmp_path), f"{tmp_path}: holds no sound checkpoint"),
        (str(tmp_path / "none"), "none: no such folder"),
    ):
        assert show_masks.main([photographs[0], "--run", given, "--out", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threshold", "1.5"],
        ["--threshold", "nan"],
        ["--progress", "2"],
        ["--ordinal", "-1"],
        ["--count", "0"],
        ["--run", "x", "--recipe", "y"],
        ["--run", "x", "--threshold", "0.5"],
    ],
)
def test_options_out_of_range_are_refused(arguments, photographs, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        show_masks.main([photographs[0], *arguments])
    assert exit_.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_the_command_works_with_its_default_recipe_and_ends_with_two_on_an_error(run_cli: RunCli, tmp_path) -> None:
    buffer = io.BytesIO()
    Pillow.fromarray(picture(5, 200, 300)).save(buffer, "PNG")
    (tmp_path / "写真.png").write_bytes(buffer.getvalue())
    done = run_cli(["python", "tools/show_masks.py", tmp_path / "写真.png", "--out", tmp_path / "out"])
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert Pillow.open(tmp_path / "out/写真-masks.png").size[0] == SCALE * mask_page.WIDTH
    wrong = run_cli(
        ["python", "tools/show_masks.py", tmp_path / "写真.png", tmp_path / "no.jpg", "--out", tmp_path / "x"]
    )
    assert wrong.returncode == 2 and wrong.stderr == f"error: {tmp_path / 'no.jpg'}: no such file\n"
    assert not (tmp_path / "x").exists()
