"""The same model on the same sets by open_clip's own code: its towers, tokenizer, classifier and metrics.

Both get the same pixels, resized as cmpt does; tests/data/test_eval_pixels.py compares the two transforms.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import RunCli
from test_train import TRAIN, overrides

import export
import prepare_eval_sets
from cmpt.data.eval_sets import CaptionedSet, LabelledSet
from cmpt.data.tokenizer import open_tokenizer
from cmpt.engine.opened import open_model
from cmpt.evals.embed import Encoder
from cmpt.evals.tasks import OpenedTask, open_tasks, run_task
from cmpt.recipe.suite import load_suite

TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def opened_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenedTask]:
    folder = tmp_path_factory.mktemp("sets") / "eval_sets"
    assert prepare_eval_sets.main(["--out", str(folder)]) == 0
    opened, absent = open_tasks(load_suite("recipes/eval/clipart.yaml"), folder)
    assert not absent
    return {one.task.name: one for one in opened}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli, open_clip: ModuleType) -> dict[str, Path]:
    """Exported from a run of a hundred steps, and as open_clip initialises a model."""
    root = tmp_path_factory.mktemp("models")
    done = run_cli([*TRAIN, *overrides(root, "run", "run.duration=100 steps", "run.checkpoint_every=100 steps")])
    assert done.returncode == 0, done.stderr
    assert export.main([str(root / "run"), str(root / "trained")]) == 0

    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CONFIG)
    with torch.no_grad():  # as it is initialised, all images have nearly one embedding
        for parameter in model.visual.parameters():
            parameter.mul_(3.0)
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (root / "initialised").mkdir()
    config = {"model_cfg": TINY_CONFIG, "preprocess_cfg": preprocess}
    (root / "initialised" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), root / "initialised" / "open_clip_model.safetensors")
    return {name: root / name for name in ("trained", "initialised")}


def recalls_of_several(image_NE: torch.Tensor, model: Any, tokenizer: Any, several: CaptionedSet) -> dict[str, float]:
    """R@k by its definition over the whole matrix of scores and the whole matrix of what belongs together."""
    texts = [caption for captions in several.captions for caption in captions]
    text_ME = torch.cat([model.encode_text(part, normalize=True) for part in tokenizer(texts).split(64)])
    belongs_NM = torch.zeros(len(image_NE), len(texts), dtype=torch.bool)
    owner_M = [n for n, captions in enumerate(several.captions) for _ in captions]
    belongs_NM[owner_M, range(len(texts))] = True
    score_NM = image_NE @ text_ME.T
    found = {}
    for way, score, belongs in (
        ("image_to_text", score_NM, belongs_NM),
        ("text_to_image", score_NM.T, belongs_NM.T),
    ):
        for k in (1, 5, 10):
            nearest = score.topk(k, dim=1).indices
            found[f"several/{way}_r{k}"] = float(belongs.gather(1, nearest).any(dim=1).double().mean())
    return found


@torch.no_grad()
def theirs(
    folder: Path, labelled: LabelledSet, several: CaptionedSet, captions: list[str], open_clip: ModuleType
) -> dict[str, float]:
    from open_clip_train.train import get_clip_metrics

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    batches = labelled.images.batches(0, 1, 64, model.visual.image_size[0])  # the images of both sets are the same
    normalise = transform.transforms[-1]
    images = torch.cat([normalise(batch.images_BCHW / 255) for batch in batches])
    image_NE = torch.cat([model.encode_image(part, normalize=True) for part in images.split(64)])
    text_NE = torch.cat([model.encode_text(part, normalize=True) for part in tokenizer(captions).split(64)])
    templates = [lambda name, template=template: template.replace("{c}", name) for template in labelled.templates]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, labelled.classnames, templates)
    # open_clip_train's own counting of these fails with numpy 2.4, which no longer makes a float of an array of one.
    right = (100.0 * image_NE @ classifier).topk(5).indices == torch.tensor(labelled.label_N)[:, None]
    found: dict[str, Any] = {"top1": float(right[:, 0].double().mean()), "top5": float(right.double().sum(1).mean())}
    found |= recalls_of_several(image_NE, model, tokenizer, several)
    metrics = get_clip_metrics(image_NE, text_NE, model.logit_scale.exp())
    for way in ("image_to_text", "text_to_image"):
        found |= {f"{way}_r{k}": float(metrics[f"{way}_R@{k}"]) for k in (1, 5, 10)}
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["trained", "initialised"])
def test_accuracy_and_recall_are_those_of_open_clips_own_code(
    name: str, folders: dict[str, Path], opened_tasks: dict[str, OpenedTask], open_clip: ModuleType
) -> None:
    model = open_model(str(folders[name]))
    recipe = model.recipe
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    encoder = Encoder(model.clip, tokenizer, recipe.image, 8, 64, 0, 1, torch.device("cpu"))
    labelled, several = opened_tasks["clipart"].test, opened_tasks["clipart_captions"].test
    assert isinstance(labelled, LabelledSet) and isinstance(several, CaptionedSet)
    first = replace(several, captions=[captions[:1] for captions in several.captions])
    ours = run_task(opened_tasks["clipart"], encoder)
    ours |= run_task(replace(opened_tasks["clipart_captions"], test=first), encoder)
    ours |= {f"several/{key}": value for key, value in run_task(opened_tasks["clipart_captions"], encoder).items()}
    firsts = [captions[0] for captions in first.captions]
    expected = theirs(folders[name], labelled, several, firsts, open_clip)
    assert len(expected) == 2 + 6 + 6
    assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert ours["image_to_text_r10"] > 0.03 or name == "initialised"  # chance is 0.02
