"""Files, overrides, origins, interpolation and the saved form of a recipe."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cmpt.recipe import RecipeError, differences, load_recipe, recipe_fingerprint, to_yaml
from cmpt.recipe.schema import Data, Evaluation, Guard, Phase, Recipe, Run, Source
from cmpt.recipe.typed import flat, plain


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, "recipe.yaml", text), overrides).recipe


def test_an_empty_recipe_is_the_schemas_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Recipe()


def test_values_arrive_with_the_types_of_the_schema(tmp_path: Path) -> None:
    text = "optimizer: {lr: 1e-3, betas: [0, 0.95], clip_norm: 1}\nimage: {flip: true, crop_scale: [0.5, 1]}"
    recipe = load(tmp_path, text + "\ndata: {train: [{urls: [a.tar, b.tar], weight: 2}]}")
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.betas == (0.0, 0.95) and isinstance(recipe.optimizer.betas[0], float)
    assert recipe.optimizer.clip_norm == 1.0 and isinstance(recipe.optimizer.clip_norm, float)
    assert recipe.image.crop_scale == (0.5, 1.0) and recipe.image.flip is True
    assert recipe.data.train == [Source(["a.tar", "b.tar"], 2.0)]


def test_a_recipe_wins_over_its_base_and_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    write(tmp_path, "bases/root.yaml", "run: {seed: 1, name: root, folder: deep}\ndata: {heldout: [a, b]}")
    write(tmp_path, "bases/middle.yaml", "extends: root.yaml\nrun: {seed: 2, name: middle}")
    recipe = load(tmp_path, "extends: bases/middle.yaml\nrun: {seed: 3}\ndata: {heldout: [c]}")
    assert (recipe.run.seed, recipe.run.name, recipe.run.folder) == (3, "middle", "deep")
    assert recipe.data.heldout == ["c"], "a list replaces a list"


def test_of_several_bases_the_later_wins(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "run: {seed: 1, name: a}")
    write(tmp_path, "b.yaml", "run: {seed: 2}")
    recipe = load(tmp_path, "extends: [a.yaml, b.yaml]")
    assert (recipe.run.seed, recipe.run.name) == (2, "a")


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "run: {seed: 7}")
    write(tmp_path, "a.yaml", "extends: root.yaml")
    write(tmp_path, "b.yaml", "extends: root.yaml")
    assert load(tmp_path, "extends: [a.yaml, b.yaml]").run.seed == 7


def test_overrides_come_last_and_take_lists_mappings_and_null(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "optimizer: {clip_norm: 1.0}\nengine: {deepspeed: {a: 1, b: {c: 2}}}\n"
        "data: {train: [{urls: [x]}, {urls: [y]}]}",
        "optimizer.clip_norm=null",
        "evaluation.prompts=['a {} here', 'of {}']",
        "engine.deepspeed={b: {d: 3}}",
        "data.train[1].weight=0.5",
        "data.train.0.urls=['z{0..3}.tar', pkg:data/w.tar]",
        "run.duration=12.8e9 samples",
        "run.name='2024'",
    )
    assert recipe.optimizer.clip_norm is None
    assert recipe.evaluation.prompts == ["a {} here", "of {}"]
    assert recipe.engine.deepspeed == {"a": 1, "b": {"c": 2, "d": 3}}
    assert recipe.data.train == [Source(["z{0..3}.tar", "pkg:data/w.tar"], 1.0), Source(["y"], 0.5)]
    assert recipe.run.duration == "12.8e9 samples"
    assert recipe.run.name == "2024"


def test_null_empties_a_list_and_a_mapping(tmp_path: Path) -> None:
    text = "engine: {deepspeed: {a: 1}}\nphases: [{name: a, duration: 1 steps}]"
    recipe = load(tmp_path, text, "engine.deepspeed=null", "phases=null")
    assert recipe.engine.deepspeed == {} and recipe.phases == []


def test_an_override_reaches_into_the_set_of_a_phase(tmp_path: Path) -> None:
    text = "phases: [{name: a, duration: 1 steps, set: {masking.ratio: 0.4}}]"
    recipe = load(tmp_path, text, "phases.0.set.masking.ratio=0.6", "phases.0.set.image.size=32")
    assert recipe.phases == [Phase("a", "1 steps", {"masking.ratio": 0.6, "image.size": 32})]


def test_only_true_and_false_are_booleans_and_numbers_are_decimal(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, "run: {name: no}\ntokenizer: {path: 010}\nengine: {batch_size: 1_024}\noptimizer: {lr: 1e-3}"
    )
    assert recipe.run.name == "no" and recipe.tokenizer.path == "010"
    assert recipe.engine.batch_size == 1024 and recipe.optimizer.lr == 0.001


def test_interpolation_sees_recipe_defaults_presets_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS", "/mnt/cc12m")
    recipe = load(
        tmp_path,
        """
        run: {name: "${model.preset}_${masking.strategy}", seed: "${engine.batch_size}"}
        model: {preset: ViT-L-14}
        data: {train: [{urls: ["${oc.env:SHARDS}/{00..11}.tar"]}]}
        evaluation: {batch_size: "${model.patch_size}"}
        engine: {deepspeed: {micro: "${oc.decode:${oc.env:MICRO,'16'}}"}}
        """,
    )
    assert recipe.run == replace(Run(), name="ViT-L-14_cluster", seed=256)
    assert recipe.data.train[0].urls == ["/mnt/cc12m/{00..11}.tar"]
    assert recipe.evaluation.batch_size == 14
    assert recipe.engine.deepspeed == {"micro": 16}


def test_every_value_has_the_origin_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        "recipes/base.yaml",
        "# a comment\nmodel:\n  preset: ViT-B-16\n  vision:\n    width: 384\nrun:\n  seed: 1",
    )
    text = "extends: base.yaml\nrun:\n  name: x\ndata:\n  train:\n    - urls:\n        - a.tar\n"
    write(tmp_path, "recipes/small.yaml", text)
    loaded = load_recipe("recipes/small.yaml", ["optimizer.lr=1e-4", "engine.deepspeed={a: {b: 1}}"])
    origins = loaded.origins
    assert origins["model.preset"] == "recipes/base.yaml:3"
    assert origins["model.vision.width"] == "recipes/base.yaml:5" and loaded.recipe.model.vision.width == 384
    assert origins["model.vision.layers"] == "preset ViT-B-16"
    assert origins["run.seed"] == "recipes/base.yaml:7"
    assert origins["run.name"] == "recipes/small.yaml:3"
    assert origins["data.train.0.urls"] == "recipes/small.yaml:6"
    assert origins["data.train.0.weight"] == "schema default"
    assert origins["optimizer.lr"] == "command line"
    assert origins["engine.deepspeed.a.b"] == "command line"
    assert origins["image.size"] == "schema default"
    assert origins.keys() == flat(plain(loaded.recipe)).keys()


def test_a_replaced_list_leaves_no_origin_behind(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "data: {train: [{urls: [a], weight: 2}]}")
    assert load_recipe(base, ["data.train=[{urls: [b]}]"]).origins["data.train.0.weight"] == "schema default"


AWKWARD = ["1e-3", "yes", "No", "null", "~", "010", "1_0", "2026-01-01", "0x1f", "12:30:00", ".inf", "true", "1.", "",
           " a ", "a: b", "# c", "- d", "{e}", "é ✓", "line\nbreak", "'q\"", "=", "<<", "*a", "C:\\x", "\\", "${x}",
           "a ${x:y} b", "\\${z}", "\\\\${z} \\", "${"]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_being_saved(tmp_path: Path, text: str) -> None:
    recipe = Recipe(evaluation=Evaluation(prompts=[text, text + "{}"]))
    recipe.engine.deepspeed = {"text": text, "list": [text, 1, None, 2.5, True], "number": 1e-9}
    assert load(tmp_path, to_yaml(recipe)) == recipe


def test_a_loaded_recipe_survives_being_saved(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.yaml",
        """
        run: {seed: 5}
        model: {preset: ViT-H-14, vocab_size: 1000}
        data: {train: [{urls: ["a-{0..9}.tar"], weight: 1.5}, {urls: [b.tar]}], heldout: []}
        optimizer: {eps: 1e-8, clip_norm: null}
        phases:
          - {name: masked, duration: 12.8e9 samples}
          - name: whole
            duration: 1.5 epochs
            set: {masking.strategy: none, image.crop_scale: [0.5, 1], optimizer.lr: 1e-5}
        """,
    )
    recipe = load_recipe(path).recipe
    saved = load(tmp_path, to_yaml(recipe))
    assert saved == recipe
    assert recipe_fingerprint(saved) == recipe_fingerprint(recipe)
    assert differences(saved, recipe) == []


def changed(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, value[0] if value else "x"]
    return {"x": 1} if isinstance(value, dict) else f"{value}x"


FREE = {"run.name", "run.folder", "run.overwrite", "run.log_every", "run.checkpoint_every", "run.keep_checkpoints",
        "run.stop_after", "data.heldout", "data.category_field", "engine.zero_stage", "data.cache_folder",
        "data.workers", "data.prefetch_batches", "data.cache", "data.cache_limit_bytes", "data.fetch_workers",
        "data.fetch_attempts", "data.fetch_timeout_s", "data.allow_pipe", "data.broken_shards", "data.stall_s",
        "decode.backend", "run.timings",
        "decode.threads", "decode.hardware_share", "model.preset", "model.init_from", "model.activation_checkpointing",
        "engine.micro_batch_size", "loss.chunk_rows", "run.keep_checkpoints_hours", "run.copy_checkpoints_to",
        "engine.offload_optimizer", "engine.overlap_communication", "engine.bucket_elements",
        *(f"guard.{field.name}" for field in fields(Guard)),
        "evaluation.every", "evaluation.batch_size", "evaluation.prompts", "evaluation.suite",
        "evaluation.suite_folder", "evaluation.tasks", "phases.0.name"}  # fmt: skip


def full_recipe() -> Recipe:
    """One whose every list of sections has an entry."""
    return Recipe(phases=[Phase("a", "1 steps")], data=Data(train=[Source(["a"])]))


@pytest.mark.parametrize("key", flat(plain(full_recipe())))
def test_the_fingerprint_covers_exactly_what_decides_the_mathematics(key: str) -> None:
    recipe, other = full_recipe(), full_recipe()
    *path, name = key.split(".")
    owner: object = other
    for part in path:
        owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
    value = changed(flat(plain(recipe))[key])
    setattr(owner, name, tuple(value) if isinstance(getattr(owner, name), tuple) else value)  # type: ignore[arg-type]
    same = recipe_fingerprint(recipe) == recipe_fingerprint(other)
    assert same == (key in FREE)
    assert (differences(recipe, other) == []) == same


def test_differences_name_the_key_and_both_values() -> None:
    other = Recipe(run=Run(seed=3, name="other"), phases=[Phase("a", "9 steps")])
    assert differences(Recipe(), other) == [
        "run.seed: 0 against 3",
        "phases: [] against not set",
        'phases.0.duration: not set against "9 steps"',
        "phases.0.set: not set against {}",
    ]


def test_long_lists_that_differ_at_the_end_still_differ() -> None:
    recipes = [Recipe(data=Data(train=[Source([*["long/" * 9] * 9, last])])) for last in "ab"]
    assert len(differences(*recipes)) == 1


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "import cmpt.recipe as r, cmpt.recipe.schema as s; print(r.recipe_fingerprint(s.Recipe()))"
    assert run_python(code) == recipe_fingerprint(Recipe())


def test_reading_a_recipe_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, cmpt.recipe.__main__; print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_infinities_are_read_as_numbers(tmp_path: Path) -> None:
    assert math.isinf(load(tmp_path, "optimizer: {lr: .inf}").optimizer.lr)


def test_a_recipe_error_is_a_value_error_with_a_line_per_fault() -> None:
    error = RecipeError(["a", "b"])
    assert isinstance(error, ValueError) and str(error) == "a\nb" and error.faults == ["a", "b"]
