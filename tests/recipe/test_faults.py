"""What a reader of a wrong recipe is told: the exact lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmpt.recipe import RecipeError, load_recipe
from cmpt.recipe.presets import PRESETS

DURATION = 'expected text with a unit, such as "2000 steps"'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def faults(text: str, *overrides: str) -> list[str]:
    Path("r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides)
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("masking: {ration: 0.3}", "masking.ration = 0.3: unknown key; did you mean masking.ratio?"),
        ("ratio: 0.3", "ratio = 0.3: unknown key; did you mean masking.ratio?"),
        ("engine: {lr: 0.3}", "engine.lr = 0.3: unknown key; did you mean optimizer.lr?"),
        ("batch_size: 8", "batch_size = 8: unknown key; did you mean engine.batch_size or evaluation.batch_size?"),
        ("tokenzier: {path: x}", 'tokenzier.path = "x": unknown key; did you mean tokenizer.path?'),
        ("model: {vison: {width: 8}}", "model.vison.width = 8: unknown key; did you mean model.vision.width?"),
        ("data: {train: [{url: [x]}]}", 'data.train.0.url = ["x"]: unknown key; did you mean data.train.0.urls?'),
        ("extend: base.yaml", 'extend = "base.yaml": unknown key; did you mean extends?'),
        ("xyzzy: 1", "xyzzy = 1: unknown key"),
        (
            "masking.ratio: 0.3",
            "masking.ratio = 0.3: dots do not nest in a recipe file; write each part as a section of its own",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(text: str, fault: str) -> None:
    assert faults(text) == [f"{fault} (r.yaml:1)"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("engine: {batch_size: abc}", 'engine.batch_size = "abc": expected a whole number'),
        ("engine: {batch_size: 1.5}", "engine.batch_size = 1.5: expected a whole number"),
        ("engine: {batch_size: 2e3}", "engine.batch_size = 2000.0: expected a whole number"),
        ("engine: {batch_size: true}", "engine.batch_size = true: expected a whole number"),
        ("engine: {batch_size: '8'}", 'engine.batch_size = "8": expected a whole number'),
        ("engine: {batch_size: null}", "engine.batch_size = null: expected a whole number"),
        ("engine: {batch_size: 010}", 'engine.batch_size = "010": expected a whole number'),
        ("optimizer: {lr: high}", 'optimizer.lr = "high": expected a number'),
        ("optimizer: {lr: false}", "optimizer.lr = false: expected a number"),
        ("run: {overwrite: yes}", 'run.overwrite = "yes": expected true or false'),
        ("run: {overwrite: 1}", "run.overwrite = 1: expected true or false"),
        ("run: {name: [a]}", 'run.name = ["a"]: expected text'),
        ("run: {name: 7}", "run.name = 7: expected text; put it in quotes"),
        ("run: {duration: 32}", f"run.duration = 32: {DURATION}"),
        ("run: {log_every: 10}", f"run.log_every = 10: {DURATION}"),
        ("optimizer: {warmup: 2000}", f"optimizer.warmup = 2000: {DURATION}"),
        ("phases: [{name: a, duration: 3}]", f"phases.0.duration = 3: {DURATION}"),
        ("data: {heldout: a.tar}", 'data.heldout = "a.tar": expected a list of texts'),
        ("data: {heldout: [a, 3]}", "data.heldout.1 = 3: expected text; put it in quotes"),
        ("data: {train: a.tar}", 'data.train = "a.tar": expected a list of sections'),
        ("data: {train: [a.tar]}", 'data.train.0 = "a.tar": expected a section with any of urls, weight'),
        ("image: {crop_scale: [0.1, 0.5, 1]}", "image.crop_scale = [0.1, 0.5, 1]: expected a list of 2 numbers"),
        ("image: {mean: [a, 0, 0]}", 'image.mean.0 = "a": expected a number'),
        ("engine: {deepspeed: 3}", "engine.deepspeed = 3: expected a mapping"),
        ("loss:", "loss = null: expected a section with any of kind, chunk_rows"),
        ("run: {name: {x: 1}}", 'run.name = {"x": 1}: expected text'),
        ("model: {preset: VIT-B16}", f'model.preset = "VIT-B16": expected one of {", ".join(PRESETS)}; '
         "did you mean ViT-B-16?"),
        ("run: {name: '${nope}'}", "run.name = \"${nope}\": Interpolation key 'nope' not found"),
        ("run: {name: '${run.name}'}", 'run.name = "${run.name}": Recursive interpolation detected'),
        ("run: {seed: '${run.name}'}", 'run.seed = "run": expected a whole number'),
        ("run: {name: '???'}", 'run.name = "???": Missing mandatory value: run.name'),
    ],
)  # fmt: skip
def test_a_wrong_type_says_what_is_expected_and_where_it_came_from(text: str, fault: str) -> None:
    assert faults(text) == [f"{fault} (r.yaml:1)"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("engine.batch_size=1.5", "engine.batch_size = 1.5: expected a whole number"),
        ("run.overwrite=yes", 'run.overwrite = "yes": expected true or false'),
        ("runn.name=x", 'runn.name = "x": unknown key; did you mean run.name?'),
        ("run.name.x=3", 'run.name = {"x": 3}: expected text'),
        ("data.train.2.weight=3", "data.train.2.weight = 3: data.train has no entry 2"),
        ("data.train.x=3", "data.train.x = 3: data.train has no entry x"),
        ("data.heldout.0.x=3", 'data.heldout.0 = {"x": 3}: expected text'),
        ("run.seed", 'bad override "run.seed": expected key=value'),
        ("=3", 'bad override "=3": expected key=value'),
        ("--run.seed=3", 'bad override "--run.seed=3": expected key=value'),
        ("extends=x.yaml", 'bad override "extends=x.yaml": extends belongs in a recipe file'),
        ("evaluation.prompts=[a", "evaluation.prompts = [a: bad YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.heldout=[x-{0..3}.tar]", "data.heldout = [x-{0..3}.tar]: bad YAML: expected ',' or ']', but got '{'; "
         "text with braces, brackets or commas needs quotes inside a list"),
        ("run.seed=", "run.seed = null: expected a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_told_from_the_file(override: str, fault: str) -> None:
    assert faults("data: {heldout: [a]}", override) == [f"{fault} (command line)"]


def test_duplicate_keys_are_a_fault_with_both_lines() -> None:
    text = "run:\n  seed: 1\nimage: {size: 32}\nrun:\n  seed: 2\n  seed: 3\n"
    assert faults(text) == [
        "run: given twice (r.yaml:1 and r.yaml:4)",
        "run.seed: given twice (r.yaml:5 and r.yaml:6)",
    ]


def test_bad_yaml_is_told_with_its_line() -> None:
    assert faults("run:\n  seed: 1\n  name: [a\n")[0].endswith("(r.yaml:4)")
    assert faults("run:\n\tseed: 1") == ["bad YAML: found character '\\t' that cannot start any token (r.yaml:2)"]
    assert faults("run: &a {name: *a}") == ["bad YAML: an alias holds itself (r.yaml:1)"]
    assert faults("? [a]\n: 1") == ["bad YAML: a key is not plain text (r.yaml:1)"]
    assert faults("- a") == ["r.yaml: expected sections (name: value) at the top, got list"]
    assert faults("run: {seed: !!int x}")[0].startswith("bad YAML: ")
    assert faults("run: {seed: !new x}")[0].startswith("bad YAML: could not determine a constructor for the tag '!new'")


def test_a_missing_file_is_named_as_it_would_be_opened() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("nowhere.yaml")
    assert caught.value.faults == ["nowhere.yaml: cannot read this recipe: No such file or directory"]
    assert faults("extends: bases/b.yaml") == ["bases/b.yaml: cannot read this recipe: No such file or directory"]
    Path("folder").mkdir()
    assert faults("extends: folder") == ["folder: cannot read this recipe: Is a directory"]


def test_a_wrong_extends_is_a_fault() -> None:
    assert faults("extends: 3") == ["extends = 3: expected a file or a list of files (r.yaml:1)"]


def test_a_cycle_of_extends_is_a_fault_that_shows_the_way() -> None:
    Path("a.yaml").write_text("extends: b.yaml")
    Path("b.yaml").write_text("extends: r.yaml")
    assert faults("extends: a.yaml") == ["r.yaml: extends itself: r.yaml -> a.yaml -> b.yaml -> r.yaml"]
    assert faults("extends: r.yaml") == ["r.yaml: extends itself: r.yaml -> r.yaml"]


def test_a_broken_interpolation_is_a_fault() -> None:
    assert faults("run: {name: '${b'}") == ["run.name = \"${b\": no viable alternative at input '${b' (r.yaml:1)"]
    environment = faults("run: {name: '${oc.env:NOT_SET_ANYWHERE}'}")
    assert "Environment variable 'NOT_SET_ANYWHERE' not found (r.yaml:1)" in environment[0].replace('"', "")


def test_all_faults_are_told_at_once() -> None:
    told = faults(
        "run:\n  seed: a\n  seed: b\nratio: 1\nmodel:\n  preset: x\nphases: [{set: {image.flip: true}}]",
        "foo",
        "loss=1",
    )
    assert len(told) == 7


def test_a_fault_stays_on_one_line() -> None:
    assert faults('run: {seed: "a\\nb"}') == ['run.seed = "a\\nb": expected a whole number (r.yaml:1)']
    assert len(faults(f"run: {{seed: {'x' * 5000}}}")[0]) < 200
