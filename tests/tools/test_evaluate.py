from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from data.making_eval_sets import label_samples, write_captioned, write_labelled

import evaluate
from cmpt.data.validate import DataError
from cmpt.evals.tasks import OpenedTask
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import to_open_clip
from cmpt.recipe.schema import Model, Text, Vision
from cmpt.recipe.suite import Suite, load_suite
from suite_results import lines_of

SUITE = """\
rows:
  source: "a table"
  values:
    CLIP: {labels: 36.1, more: 20.0, captions/image_to_text_r1: 35.0}
    FLIP: {labels: 34.4}
tasks:
  - {name: labels, kind: zero_shot, path: labels}
  - {name: captions, kind: retrieval, path: captions}
  - {name: more, kind: zero_shot, path: labels, metric: mean_per_class}
  - {name: gone, kind: zero_shot, path: gone}
"""


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_labelled(folder / "labels", label_samples(7))
    write_captioned(folder / "captions", [["one"], ["two", "three"]])
    (folder / "suite.yaml").write_text(SUITE)
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare file of weights of the native kind."""
    tower = {"width": 64, "layers": 1, "heads": 1}
    small = Model(patch_size=8, embed_dim=16, vision=Vision(**tower), text=Text(**tower), vocab_size=49408)
    file = tmp_path_factory.mktemp("model") / "weights.pt"
    weights = to_open_clip({name: p.detach() for name, p in CLIP(small, 32, seed=0).named_parameters()}, small)
    torch.save(weights, file)
    return file


def test_the_table_has_published_figures_where_they_are_of_the_same_measure(suite_file: Path) -> None:
    results = {
        "labels": {"top1": 0.4, "mean_per_class": 0.3},
        "captions": {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25},
        "more": {"mean_per_class": 0.2},
    }
    lines = lines_of(load_suite(suite_file), results)
    assert [(line.task, line.ours, line.published) for line in lines] == [
        ("labels", 40.0, {"CLIP": 36.1, "FLIP": 34.4}),
        ("captions", 50.0, {"CLIP": 35.0, "FLIP": None}),
        ("captions", 25.0, {"CLIP": None, "FLIP": None}),
        ("more", 20.0, {"CLIP": 20.0, "FLIP": None}),
        ("mean of 2 zero-shot tasks", pytest.approx(30.0), {"CLIP": pytest.approx(28.05), "FLIP": None}),
    ]


def test_a_suite_without_figures_has_none(suite_file: Path) -> None:
    suite = load_suite(suite_file)
    (line,) = lines_of(Suite(suite.tasks[:1]), {"labels": {"top1": 0.5}})
    assert line.published == {}


def test_console_json_and_picture(
    suite_file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    command = [str(model), "--suite", str(suite_file), "--data", str(suite_file.parent), "--out", str(out)]
    assert evaluate.main(command) == 0
    said = capsys.readouterr()
    assert "labels" in said.out and "36.1" in said.out and "left out: gone: " in said.out
    assert "1 of 3: labels took" in said.err
    told = json.loads(out.read_text())
    assert set(told["results"]) == {"labels", "captions", "more"} and set(told["left_out"]) == {"gone"}
    assert told["results"]["labels"]["samples"] == 7 and told["results"]["captions"]["texts"] == 3
    assert len(told["weights_sha256"]) == 64 and told["environment"]["revision"]
    assert (
        told["suite_file"] == str(suite_file)
        and len(told["suite"]["tasks"]) == 4
        and told["data"] == str(suite_file.parent)
    )
    with PIL.Image.open(tmp_path / "results.png") as picture:
        assert min(picture.size) > 200

    assert evaluate.main([*command, "--tasks", "labels"]) == 0
    again = json.loads(out.read_text())
    assert set(again["results"]) == {"labels"} and not again["left_out"]
    assert again["weights_sha256"] == told["weights_sha256"]
    assert again["results"]["labels"]["top1"] == told["results"]["labels"]["top1"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "labls"], "no task labls: expected one of labels, captions, more, gone; did you mean labels?"),
        (["--tasks", "labels", "gone"], "task gone: "),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    more: list[str], said: str, suite_file: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(model), "--suite", str(suite_file), "--data", str(suite_file.parent), *more]
    assert evaluate.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_folder_that_is_not_there_and_options_that_belong_together(
    suite_file: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([str(model), "--suite", str(suite_file), "--data", "/nowhere"]) == 2
    assert "error: /nowhere: the folder of the evaluation sets is missing" in capsys.readouterr().err
    for wrong in (["--suite", str(suite_file)], ["--data", "x"], ["--tasks", "labels"]):
        with pytest.raises(SystemExit):
            evaluate.main([str(model), *wrong])
        assert "--suite" in capsys.readouterr().err


def test_a_broken_image_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = label_samples(5)
    samples[3]["jpg"] = samples[3]["jpg"][:200]
    write_labelled(tmp_path / "labels", samples)
    (tmp_path / "suite.yaml").write_text("tasks:\n  - {name: labels, kind: zero_shot, path: labels}\n")
    assert evaluate.main([str(model), "--suite", str(tmp_path / "suite.yaml"), "--data", str(tmp_path)]) == 2
    assert "error: labels: test/0.tar/s0000003.jpg: " in capsys.readouterr().err


def test_what_has_failed_loses_no_other_result(
    model: Path, suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_fails(opened: OpenedTask, encoder: object) -> dict[str, float]:
        if opened.task.name == "captions":
            raise DataError("captions/0.tar/7.jpg: is broken")
        return {"top1": 0.5, "mean_per_class": 0.25}

    monkeypatch.setattr(evaluate, "run_task", one_fails)
    command = [str(model), "--suite", str(suite_file), "--data", str(suite_file.parent)]
    assert evaluate.main([*command, "--out", str(tmp_path / "r.json")]) == 2
    told = json.loads((tmp_path / "r.json").read_text())
    assert list(told["results"]) == ["labels", "more"] and list(told["failed"]) == ["captions"]
    assert "left out: captions: captions/0.tar/7.jpg: is broken" in capsys.readouterr().out


def test_a_model_whose_embeddings_are_no_numbers_is_not_a_perfect_one(
    suite_file: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(model, weights_only=True)
    weights["visual.proj"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    command = [str(tmp_path / "nan.pt"), "--suite", str(suite_file), "--data", str(suite_file.parent)]
    assert evaluate.main(command) == 2
    assert capsys.readouterr().err.count("embeddings are not finite") == 3


@pytest.mark.parametrize("out", ["gone/r.json", "r.png"])
def test_a_place_for_the_results_is_checked_before_the_work(
    out: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main([str(model), "--out", str(tmp_path / out)])
    assert "expected a JSON file in a folder that is there" in capsys.readouterr().err
