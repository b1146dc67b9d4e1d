"""Suite files: what they hold, and how what is wrong with one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmpt.recipe import RecipeError
from cmpt.recipe.suite import FORMATS, METRICS, Rows, Suite, Task, load_suite

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "eval"


def write(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_suite(write(folder, text))
    return error.value.faults


def test_tasks_get_the_format_of_their_kind_and_keep_what_is_given(tmp_path: Path) -> None:
    suite = load_suite(
        write(
            tmp_path,
            """
tasks:
  - {name: a, kind: zero_shot, path: wds_a}
  - {name: b, kind: linear_probe, path: /b, format: image_folder, split: val, validation_split: dev, metric: top1}
  - {name: c, kind: composition, path: c, images: val2017, categories: [swap_att]}
  - {name: d, kind: retrieval, path: "pkg:data", metric: text_to_image_r5}
rows: {source: somewhere, values: {CLIP: {a: 36.1, d/image_to_text_r1: 24, c/swap_att: 70}}}
""",
        )
    )
    assert suite == Suite(
        [
            Task("a", "zero_shot", "wds_a", "webdataset", split="test"),
            Task("b", "linear_probe", "/b", "image_folder", "val", "top1", "train", "dev"),
            Task("c", "composition", "c", "sugarcrepe", images="val2017", categories=["swap_att"]),
            Task("d", "retrieval", "pkg:data", "webdataset", metric="text_to_image_r5"),
        ],
        Rows("somewhere", {"CLIP": {"a": 36.1, "d/image_to_text_r1": 24, "c/swap_att": 70}}),
    )
    assert [task.metrics for task in suite.tasks] == [("top1",), ("top1",), ("accuracy",), ("text_to_image_r5",)]
    assert Task("r", "retrieval", "r").metrics == ("image_to_text_r1", "text_to_image_r1")
    folders = [str(task.folder(Path("/data"))) for task in suite.tasks]
    assert folders[:3] == ["/data/wds_a", "/b", "/data/c"] and folders[3].endswith("/cmpt/data")
    assert load_suite(write(tmp_path, "tasks: [{name: a, kind: zero_shot, path: a}]")).rows is None


A = "tasks:\n  - {name: a, kind: zero_shot, path: a}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "tasks = null: expected a list of tasks, at least one (FILE)"),
        ("tasks: []", "tasks = []: expected a list of tasks, at least one (FILE:1)"),
        ("tasks: {a: 1}", 'tasks = {"a": 1}: expected a list of tasks, at least one (FILE:1)'),
        (A + "task: 1", "task = 1: unknown key; did you mean tasks? (FILE:3)"),
        (A + "  - wds_b", 'tasks.1 = "wds_b": expected a section with any of name, kind, path, format, '),
        (A + "  - {kind: zero_shot, path: b}", "tasks.1.name = null: must be given (FILE)"),
        (A + "  - {name: b, path: b}", "tasks.b.kind = null: must be given (FILE)"),
        (A + "  - {name: b, kind: zero_shot}", "tasks.b.path = null: must be given (FILE)"),
        (A + '  - {name: b, kind: zero_shot, path: ""}', 'tasks.b.path = "": expected a folder (FILE:3)'),
        (A + "  - {name: b, kind: zero_shot, path: 7}", "tasks.b.path = 7: expected text; put it in quotes (FILE:3)"),
        (A + "  - {name: b, kind: zero_shot, path: b, spilt: x}", "did you mean split? (FILE:3)"),
        (
            A + "  - {name: b c, kind: zero_shot, path: b}",
            'tasks.1.name = "b c": expected letters, digits, _ and - only',
        ),
        (A + "  - {name: a, kind: zero_shot, path: b}", 'tasks.a.name = "a": two tasks have this name (FILE:3)'),
        (A + "  - {name: b, kind: zeroshot, path: b}", "linear_probe, composition; did you mean zero_shot? (FILE:3)"),
        (
            A + "  - {name: b, kind: retrieval, path: b, format: image_folder}",
            'tasks.b.format = "image_folder": for retrieval expected one of webdataset (FILE:3)',
        ),
        (
            A + "  - {name: b, kind: zero_shot, path: b, train_split: x}",
            'tasks.b.train_split = "x": belongs to linear_probe, this is zero_shot (FILE:3)',
        ),
        (
            A + "  - {name: b, kind: zero_shot, path: b, metric: top_1}",
            'tasks.b.metric = "top_1": expected one of top1, top5, mean_per_class; did you mean top1? (FILE:3)',
        ),
        (A + "rows: {source: x}", "rows.values = null: must be given (FILE)"),
        (A + "rows: {source: x, values: {CLIP: 3}}", "rows.values.CLIP = 3: expected task: per cent (FILE:3)"),
        (
            A + "rows: {source: x, values: {CLIP: {aa: 3}}}",
            "rows.values.CLIP.aa = 3: no task has this name: expected one of a; did you mean a? (FILE:3)",
        ),
        (
            A + "rows: {source: x, values: {CLIP: {a/r1: 3}}}",
            "rows.values.CLIP.a/r1 = 3: no such result of zero_shot: ",
        ),
        (
            A + "rows: {source: x, values: {CLIP: {a: 361}}}",
            "rows.values.CLIP.a = 361: expected per cent, 0 to 100 (FILE:3)",
        ),
        (A + "rows: {source: x, values: {CLIP: {a: .nan}}}", "rows.values.CLIP.a = NaN: expected per cent, 0 to 100"),
    ],
)
def test_a_fault_names_the_task_the_field_the_value_and_the_line(tmp_path: Path, text: str, told: str) -> None:
    (fault,) = faults(tmp_path, text)
    assert told.replace("FILE", str(tmp_path / "suite.yaml")) in fault


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = A + "  - {name: b, kind: x, path: b}\n  - {name: a, kind: retrieval, path: c, metric: r1}\n"
    assert len(faults(tmp_path, text + "rows: {source: s, values: {CLIP: {z: 3}}}")) == 4


def test_what_is_no_suite_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere.yaml: there is no such suite file"):
        load_suite(tmp_path / "nowhere.yaml")
    assert "bad YAML" in faults(tmp_path, "tasks: [")[0]
    assert "given twice" in faults(tmp_path, "tasks:\n  - {name: a, name: b, kind: zero_shot, path: a}")[0]


def test_every_kind_in_every_format_is_among_the_embedded_sets() -> None:
    suite = load_suite(SHIPPED / "clipart.yaml")
    kinds = {(task.kind, task.format) for task in suite.tasks}
    assert {kind for kind, _ in kinds} == set(FORMATS) == set(METRICS)
    assert {form for _, form in kinds} == {form for formats in FORMATS.values() for form in formats}


def test_the_paper_s_suite_has_its_sets_and_its_figures() -> None:
    """arXiv 2405.08815: twelve classification sets, whose published means its rows must give."""
    suite = load_suite(SHIPPED / "paper.yaml")
    by_kind = {kind: [task.name for task in suite.tasks if task.kind == kind] for kind in FORMATS}
    assert [len(by_kind[kind]) for kind in ("zero_shot", "retrieval", "linear_probe", "composition")] == [12, 3, 3, 3]
    assert suite.rows is not None and "2405.08815" in suite.rows.source
    means = [sum(row[name] for name in by_kind["zero_shot"]) / 12 for row in suite.rows.values.values()]
    assert means == pytest.approx([36.1, 33.5, 35.8, 35.0, 36.5, 36.8, 38.2], abs=0.075)
