"""The checks: a recipe that can run has no fault; each way to spoil it gives exactly the line that names it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cmpt.recipe import Absent, check_recipe, load_recipe
from cmpt.recipe.check import CHOICES, RANGES
from cmpt.recipe.schema import (
    Data,
    Engine,
    Image,
    Masking,
    Model,
    Phase,
    Recipe,
    Run,
    Source,
    Text,
    TextMasking,
    Tokenizer,
    Vision,
)
from cmpt.recipe.typed import flat, plain

STRATEGIES = "cluster, random, centred, block, grid, scores, none"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """One that passes every check, from the folder that holds its files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a-0.tar", "a-1.tar", "b.tar", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"")
    return Recipe(
        run=Run(duration="10 steps"),
        data=Data(train=[Source(["a-{0..1}.tar"])], heldout=["b.tar"], streams=8),
        tokenizer=Tokenizer(path="tokenizer.model"),
        image=Image(size=32),
        model=Model(patch_size=8, embed_dim=32, vision=Vision(64, 2, 4), text=Text(64, 2, 4)),
        engine=Engine(batch_size=64),
    )


def put(recipe: Recipe, key: str, value: Any) -> None:
    owner: Any = recipe
    *path, name = key.split(".")
    for part in path:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    setattr(owner, name, value)


def test_a_good_recipe_has_no_faults(recipe: Recipe) -> None:
    assert check_recipe(recipe) == []
    assert check_recipe(recipe, world_size=4) == []


SPOILED: list[tuple[str, Any, str]] = [
    ("run.seed", -1, "run.seed = -1: must be >= 0"),
    ("run.keep_checkpoints", 0, "run.keep_checkpoints = 0: must be >= 1"),
    ("run.duration", None, "run.duration = null: must be given where there are no phases"),
    ("run.duration", "10", 'run.duration = "10": has no unit; add "epochs", "steps" or "samples"'),
    ("run.duration", "0 steps", 'run.duration = "0 steps": must be above 0'),
    ("run.log_every", "0 steps", 'run.log_every = "0 steps": must be above 0'),
    ("run.checkpoint_every", "5 setps", 'run.checkpoint_every = "5 setps": unknown unit "setps"; did you mean '
     '"steps"?'),
    ("run.stop_after", "-1 steps", 'run.stop_after = "-1 steps": must not be negative'),
    ("run.folder", "", 'run.folder = "": must not be empty'),
    *(
        ("run.name", name, f'run.name = "{name}": must be a plain folder name of letters, digits and . _ + = @ -')
        for name in ("", "..", "../x", "/etc", "a/../b", "a b", "a*")
    ),
    ("data.train", [], "data.train = []: must name at least one shard of training pairs"),
    ("data.train.0.weight", 0.0, "data.train.0.weight = 0.0: must be > 0"),
    ("data.train.0.weight", math.inf, "data.train.0.weight = Infinity: must be > 0"),
    ("data.train.0.urls", ["a-{0.tar"], 'data.train.0.urls = "a-{0.tar": has unbalanced braces'),
    ("data.train.0.urls", ["a-{0..9}.tar"], 'data.train.0.urls = "a-{0..9}.tar": 8 of 10 shards do not exist: a-2.tar, '
     "a-3.tar, a-4.tar, ..."),
    ("data.train.0.urls", ["no/{00..11}.tar"], 'data.train.0.urls = "no/{00..11}.tar": 12 of 12 shards do not exist: '
     "no/00.tar, no/01.tar, no/02.tar, ...; give your own: data.train.0.urls=[...]"),
    ("data.heldout", ["c.tar"], 'data.heldout = "c.tar": no such file: c.tar; give your own: data.heldout=[...]'),
    ("data.image_extensions", [], "data.image_extensions = []: must not be empty"),
    ("data.image_extensions", [".jpg"], 'data.image_extensions = ".jpg": must not begin with a dot'),
    ("data.caption_extension", "text", 'data.caption_extension = "text": expected one of txt, json; did you mean txt?'),
    ("data.streams", 0, "data.streams = 0: must be >= 1"),
    ("data.streams", 7, "engine.batch_size = 64: must be a multiple of data.streams = 7"),
    ("data.workers", 0, "data.workers = 0: must be >= 1"),
    ("data.prefetch_batches", 0, "data.prefetch_batches = 0: must be >= 1"),
    ("data.max_image_pixels", 0, "data.max_image_pixels = 0: must be >= 1"),
    ("tokenizer.kind", "bpe", 'tokenizer.kind = "bpe": expected one of sentencepiece, clip_bpe; did you mean '
     "clip_bpe?"),
    ("tokenizer.path", "gone.model", 'tokenizer.path = "gone.model": no such file'),
    ("tokenizer.path", None, "tokenizer.path = null: must name the .model file of the sentencepiece tokenizer"),
    ("image.size", 30, "image.size = 30: must be a multiple of model.patch_size = 8"),
    ("image.size", 0, "image.size = 0: must be >= 1"),
    ("image.crop_scale", (0.0, 1.0), "image.crop_scale = [0.0, 1.0]: must be > 0 and <= 1"),
    ("image.crop_scale", (0.9, 0.5), "image.crop_scale = [0.9, 0.5]: the first must be <= the second"),
    ("image.crop_ratio", (2.0, 0.5), "image.crop_ratio = [2.0, 0.5]: the first must be <= the second"),
    ("image.std", (0.2, 0.0, 0.2), "image.std = [0.2, 0.0, 0.2]: must be > 0"),
    ("model.patch_size", None, "model.patch_size = null: must be given, or a model.preset that has it"),
    ("model.vision.heads", 5, "model.vision.heads = 5: must divide model.vision.width = 64"),
    ("model.text.heads", 0, "model.text.heads = 0: must be >= 1"),
    ("model.text.width", None, "model.text.width = null: must be given, or a model.preset that has it"),
    ("model.context_length", 2, "model.context_length = 2: must be >= 3"),
    ("model.temperature_init", 0.001, "model.temperature_init = 0.001: 1 / this must be <= "
     "model.logit_scale_max = 100.0"),
    ("model.temperature_init", 0.0, "model.temperature_init = 0.0: must be > 0"),
    ("masking.strategy", "clustr", f'masking.strategy = "clustr": expected one of {STRATEGIES}; did you mean cluster?'),
    ("masking.ratio_end", 0.2, "masking.min_ratio = 0.3: must be <= masking.ratio_end = 0.2"),
    ("masking.min_ratio_end", 0.6, "masking.min_ratio_end = 0.6: must be <= masking.ratio = 0.5"),
    ("masking.anchors", 0, "masking.anchors = 0: must be >= 1"),
    ("masking.embedding_share_end", 1.5, "masking.embedding_share_end = 1.5: must be >= 0 and <= 1"),
    ("masking.constant_patches", "same", 'masking.constant_patches = "same": expected one of alike, unlike'),
    ("masking.scores", "a:b", 'masking.scores = "a:b": must be null with masking.strategy = "cluster"'),
    ("text_masking.strategy", "random", 'text_masking.tokens = null: must be given with '
     'text_masking.strategy = "random"'),
    ("text_masking.tokens", 8, 'text_masking.tokens = 8: must be null with text_masking.strategy = "none"'),
    ("masking.ratio", 0.2, "masking.min_ratio = 0.3: must be <= masking.ratio = 0.2"),
    ("masking.ratio", 1.0, "masking.ratio = 1.0: must be >= 0 and < 1"),
    ("masking.anchor_ratio", 0.0, "masking.anchor_ratio = 0.0: must be > 0 and < 1"),
    ("masking.threshold", 1.5, "masking.threshold = 1.5: must be >= -1 and <= 1"),
    ("optimizer.lr", math.nan, "optimizer.lr = NaN: must be > 0"),
    ("optimizer.lr", math.inf, "optimizer.lr = Infinity: must be > 0"),
    ("optimizer.min_lr", 1.0, "optimizer.min_lr = 1.0: must be <= optimizer.lr = 0.0005"),
    ("optimizer.warmup", "-5 steps", 'optimizer.warmup = "-5 steps": must not be negative'),
    ("optimizer.betas", (0.9, 1.0), "optimizer.betas = [0.9, 1.0]: must be >= 0 and < 1"),
    ("optimizer.clip_norm", 0.0, "optimizer.clip_norm = 0.0: must be > 0"),
    ("loss.kind", "InfoNCE", 'loss.kind = "InfoNCE": expected one of infonce, sigmoid; did you mean infonce?'),
    ("loss.kind", "sigmoid", "model.logit_bias_init = null: must be given with loss.kind = sigmoid"),
    ("model.logit_bias_init", -10.0, "model.logit_bias_init = -10.0: must be null with loss.kind = infonce"),
    ("model.init_from", "gone", 'model.init_from = "gone": no such file or folder'),
    ("model.vision.pooling", "mean", 'model.vision.pooling = "mean": expected one of class_token, average'),
    ("model.text.pooling", "last", 'model.text.pooling = "last": expected one of eos, argmax'),
    ("model.text.layer_norm_eps", 0.0, "model.text.layer_norm_eps = 0.0: must be > 0"),
    ("model.vision.layer_scale_init", 0.0, "model.vision.layer_scale_init = 0.0: must be > 0"),
    ("loss.chunk_rows", 0, "loss.chunk_rows = 0: must be >= 1"),
    ("engine.batch_size", 60, "engine.batch_size = 60: must be a multiple of data.streams = 8"),
    ("engine.precision", "fp8", 'engine.precision = "fp8": expected one of bf16, fp16, fp32; did you mean fp32?'),
    ("engine.bucket_elements", 0, "engine.bucket_elements = 0: must be >= 1"),
    ("engine.deepspeed", {"gradient_clipping": 1.0}, "engine.deepspeed.gradient_clipping = 1.0: is decided by "
     "optimizer.clip_norm"),
    ("engine.deepspeed", {"bf16": {"enabled": True}}, 'engine.deepspeed.bf16 = {"enabled": true}: is decided by '
     "engine.precision"),
    ("engine.deepspeed", {"zero_optimization": {"stage": 3}}, "engine.deepspeed.zero_optimization.stage = 3: is "
     "decided by engine.zero_stage"),
    ("engine.deepspeed", {"zero_optimization": 3}, "engine.deepspeed.zero_optimization = 3: must be a section (name: "
     "value)"),
    ("run.copy_checkpoints_to", "runs/run/copies", 'run.copy_checkpoints_to = "runs/run/copies": must be a folder '
     "outside of the run's"),
    ("run.keep_checkpoints_hours", -1.0, "run.keep_checkpoints_hours = -1.0: must be >= 0"),
    ("optimizer.vision_layer_decay", 0.0, "optimizer.vision_layer_decay = 0.0: must be > 0 and <= 1"),
    ("optimizer.ema_decay", 1.0, "optimizer.ema_decay = 1.0: must be >= 0 and < 1"),
    ("guard.action", "ignore", 'guard.action = "ignore": expected one of skip, rewind, stop'),
    ("guard.unequal_weights", "no", 'guard.unequal_weights = "no": expected one of stop, rewind'),
    ("run.copy_checkpoints_to", "runs", 'run.copy_checkpoints_to = "runs": must be a folder outside of the run\'s'),
    ("engine.deepspeed", {"zero_optimization": {"offload_param": 1}}, "engine.deepspeed.zero_optimization."
     "offload_param = 1: is not supported"),
    ("guard.watchdog_seconds", 1.0, "guard.watchdog_seconds = 1.0: must be >= 3"),
    ("engine.zero_stage", 4, "engine.zero_stage = 4: must be >= 0 and <= 3"),
    ("evaluation.every", "often", 'evaluation.every = "often": expected a number and a unit, such as "2000 steps"; '
     'units are "epochs", "steps" or "samples"'),
    ("evaluation.batch_size", 0, "evaluation.batch_size = 0: must be >= 1"),
    ("evaluation.suite", "gone.yaml", 'evaluation.suite = "gone.yaml": no such file'),
    ("evaluation.tasks", ["x"], 'evaluation.tasks = ["x"]: belongs to evaluation.suite, which is null'),
    ("evaluation.prompts", ["a dog"], 'evaluation.prompts = "a dog": must hold {}, the place of the category'),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fault"), SPOILED)
def test_one_wrong_field_gives_one_line(recipe: Recipe, key: str, value: Any, fault: str) -> None:
    put(recipe, key, value)
    assert check_recipe(recipe) == [fault]


def test_every_number_and_every_choice_of_the_schema_is_checked() -> None:
    numbers = {
        key for key, value in flat(plain(Recipe())).items()
        if any(type(item) in (int, float) for item in (value if isinstance(value, list) else [value]))
    }  # fmt: skip
    assert numbers <= RANGES.keys()
    for key in (*RANGES, *CHOICES):
        owner: Any = Recipe()
        for part in key.split("."):
            owner = getattr(owner, part)


def test_the_processes_must_divide_the_streams(recipe: Recipe) -> None:
    fault = "data.streams = 8: must be a multiple of the number of processes = 3"
    assert check_recipe(recipe, world_size=3) == [fault]


def test_warm_up_may_be_nothing(recipe: Recipe) -> None:
    recipe.optimizer.warmup = "0 steps"
    assert check_recipe(recipe) == []


def test_the_least_ratio_matters_to_cluster_only(recipe: Recipe) -> None:
    recipe.masking.strategy, recipe.masking.ratio = "random", 0.1
    assert check_recipe(recipe) == []


@pytest.mark.parametrize("url", ["s3://b/{0..9}.tar", "https://h/x.tar?a=*", "pipe:cat x.tar", "gs://b/y.tar"])
def test_shards_behind_urls_need_the_cache_and_pipes_a_permission(url: str, recipe: Recipe) -> None:
    recipe.data.train = [Source([url])]
    recipe.data.allow_pipe = True
    assert check_recipe(recipe) == []
    recipe.data.cache = "never"
    (fault,) = check_recipe(recipe)
    assert fault.startswith(f'data.train.0.urls = "{url}": must be a path with data.cache = "never"')
    recipe.data.cache, recipe.data.allow_pipe = "remote", False
    faults = check_recipe(recipe)
    assert [fault.endswith("needs data.allow_pipe=true") for fault in faults] == [True] * url.startswith("pipe")


def test_wildcards_and_schemes_that_lead_nowhere_are_refused(recipe: Recipe) -> None:
    recipe.data.train = [Source(["no/*.tar"]), Source(["ftp://h/x.tar"]), Source(["a-?.tar"])]
    first, second = check_recipe(recipe)
    assert first == 'data.train.0.urls = "no/*.tar": matches no file; give your own: data.train.0.urls=[...]'
    assert second.startswith('data.train.1.urls = "ftp://h/x.tar": must be a path or one of http:, https:, s3:')


def test_tasks_must_be_of_the_suite(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("tasks: [{name: digits, kind: zero_shot, path: x}]")
    recipe.evaluation.suite, recipe.evaluation.tasks = str(tmp_path / "s.yaml"), ["digits"]
    assert not check_recipe(recipe)
    recipe.evaluation.tasks = ["digit"]
    assert check_recipe(recipe) == ['evaluation.tasks = "digit": expected one of digits; did you mean digits?']


@pytest.mark.parametrize("prompt", ["a picture", "a {x} of {}", "{} {", "{0} and {1}"])
def test_a_prompt_that_cannot_take_a_category_is_refused(prompt: str, recipe: Recipe) -> None:
    recipe.evaluation.prompts = [prompt]
    (fault,) = check_recipe(recipe)
    assert fault.startswith("evaluation.prompts = ") and fault.endswith("must hold {}, the place of the category")


def test_shards_of_the_package_and_of_the_home_folder_are_found(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe.data.train = [Source(["pkg:recipe/{load,check}.py", "~/a-0.tar", f"file:{tmp_path}/b.tar"])]
    assert check_recipe(recipe) == []


def test_the_bpe_of_clip_needs_its_merges(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.tokenizer = Tokenizer(kind="clip_bpe")
    monkeypatch.setattr("cmpt.recipe.check.find_spec", lambda name: None)
    assert check_recipe(recipe) == [
        "tokenizer.path = null: must name CLIP's bpe_simple_vocab_16e6.txt.gz; null needs open_clip_torch, "
        "not installed here"
    ]
    monkeypatch.setattr("cmpt.recipe.check.find_spec", lambda name: object())
    assert check_recipe(recipe) == []


def test_what_only_this_machine_lacks_is_told_apart(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmpt.recipe.check.find_spec", lambda name: None)
    recipe.data = Data(train=[Source(["no/*.tar", "no/{0..9}.tar"])], heldout=["no.tar"], streams=8)
    recipe.model.init_from, recipe.evaluation.suite = "gone", "gone.yaml"
    recipe.text_masking = TextMasking(strategy="frequency", tokens=8, frequencies="gone")
    recipe.tokenizer = Tokenizer(kind="clip_bpe")
    recipe.run.seed = -1
    wrong, *absent = check_recipe(recipe)
    assert wrong == "run.seed = -1: must be >= 0" and not isinstance(wrong, Absent)
    assert len(absent) == 7 and all(isinstance(fault, Absent) for fault in absent)
    recipe.tokenizer, recipe.run.seed = Tokenizer(path="gone"), 0
    absent = check_recipe(recipe)
    assert len(absent) == 7 and all(isinstance(fault, Absent) for fault in absent)


def test_phases_are_checked_as_they_run(recipe: Recipe) -> None:
    recipe.run.duration = None
    recipe.phases = [
        Phase("a", "5 steps", {"image.size": 36, "masking.strategy": "clustr", "optimizer.lr": -1.0}),
        Phase("b", "0 steps", {"masking.ratio": 0.1}),
        Phase("b", "5 steps", {"image.flip": True, "optimizer.warmup": "x"}),
    ]
    assert check_recipe(recipe) == [
        'phases.0.set.optimizer.lr = -1.0: must be > 0 in phase "a"',
        f'phases.0.set.masking.strategy = "clustr": expected one of {STRATEGIES}; did you mean cluster? in phase "a"',
        'phases.0.set.image.size = 36: must be a multiple of model.patch_size = 8 in phase "a"',
        'optimizer.min_lr = 0.0: must be <= optimizer.lr = -1.0 in phase "a"',
        'phases.1.duration = "0 steps": must be above 0',
        'masking.min_ratio = 0.3: must be <= masking.ratio = 0.1 in phase "b"',
        'phases.2.name = "b": must differ from the names of the other phases',
        "phases.2.set.image.flip = true: a phase sets only masking.*, text_masking.*, image.size, image.crop_scale, "
        "optimizer.lr, optimizer.min_lr and optimizer.warmup",
        'phases.2.set.optimizer.warmup = "x": expected a number and a unit, such as "2000 steps"; units are "epochs", '
        '"steps" or "samples" in phase "b"',
    ]


@pytest.mark.parametrize(
    ("masking", "fault"),
    [
        (
            {"anchors": 36},
            "masking.anchors = 36: must be < 36, the patches of an image of 48 pixels",
        ),
        (
            {"anchors": 4, "anchor_ratio_end": 0.1},
            "masking.anchor_ratio_end = 0.1: must be null where masking.anchors is given",
        ),
        (
            {"anchors": 20},
            "masking.anchors = 20: must hide at most masking.ratio = 0.5 of the patches, hides 20 of 36",
        ),
        (
            {"anchor_ratio": 0.1, "anchor_ratio_end": 0.9},
            "masking.anchor_ratio_end = 0.9: must hide at most masking.ratio = 0.5 of the patches, hides 32 of 36",
        ),
        (
            {"ratio": 0.49, "min_ratio": 0.49},
            "masking.min_ratio = 0.49: must hide at most masking.ratio = 0.49 of the patches, hides 18 of 36",
        ),
        (
            {"strategy": "grid"},
            'masking.ratio = 0.5: must be 0.75 with masking.strategy = "grid": one patch of four stays',
        ),
        (
            {"strategy": "scores"},
            'masking.scores = null: must name a function as "module:name" with masking.strategy = "scores"',
        ),
        (
            {"strategy": "scores", "scores": "saliency.py"},
            'masking.scores = "saliency.py": must name a function as "module:name" with masking.strategy = "scores"',
        ),
    ],
)
def test_what_does_not_fit_a_masking_strategy_gives_one_line(
    recipe: Recipe, masking: dict[str, Any], fault: str
) -> None:
    recipe.image.size = 48
    recipe.masking = Masking(**masking)
    assert check_recipe(recipe) == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ({"strategy": "random", "tokens": 99}, "text_masking.tokens = 99: must be <= model.context_length = 77"),
        (
            {"strategy": "frequency", "tokens": 8},
            "text_masking.frequencies = null: must name the table that tools/count_words.py writes, "
            'with text_masking.strategy = "frequency"',
        ),
        (
            {"strategy": "frequency", "tokens": 8, "frequencies": "/no/such"},
            'text_masking.frequencies = "/no/such": no such file',
        ),
    ],
)
def test_what_does_not_fit_a_text_masking_gives_one_line(recipe: Recipe, text: dict[str, Any], fault: str) -> None:
    recipe.text_masking = TextMasking(**text)
    assert check_recipe(recipe) == [fault]


def test_a_fault_of_the_whole_recipe_is_not_told_again_for_each_phase(recipe: Recipe) -> None:
    recipe.run.duration = None
    recipe.phases = [Phase("a", "5 steps"), Phase("b", "5 steps")]
    recipe.image.size = 30
    assert check_recipe(recipe) == ["image.size = 30: must be a multiple of model.patch_size = 8"]


def test_a_duration_and_phases_exclude_each_other(recipe: Recipe) -> None:
    recipe.phases = [Phase("a", "5 steps")]
    assert check_recipe(recipe) == ['run.duration = "10 steps": must be null where phases are given']


def test_origins_are_added_where_they_are_known(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "run: {duration: 1 steps}\ndata:\n  train: [{urls: [gone.tar]}]\ntokenizer: {kind: clip_bpe, path: gone}\n"
    )
    loaded = load_recipe(str(path), ["model.preset=tiny-8", "run.seed=-1"])
    assert check_recipe(loaded.recipe, 1, loaded.origins) == [
        "run.seed = -1: must be >= 0 (command line)",
        f'data.train.0.urls = "gone.tar": no such file: gone.tar; give your own: data.train.0.urls=[...] ({path}:3)',
        f'tokenizer.path = "gone": no such file ({path}:4)',
    ]


def test_cluster_masking_has_a_largest_grid(recipe: Recipe) -> None:
    recipe.image.size = 8 * 65
    constraint = 'must give at most 4096 patches with masking.strategy = "cluster", gives 4225'
    assert check_recipe(recipe) == [f"image.size = 520: {constraint}"]
    recipe.masking.strategy = "random"
    assert check_recipe(recipe) == []
