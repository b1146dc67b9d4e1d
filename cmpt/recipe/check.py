"""What makes a recipe impossible or dangerous to run, found before any worker starts. Torch-free."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from cmpt.recipe.check_data import data_faults
from cmpt.recipe.check_masking import masking_faults, text_masking_faults
from cmpt.recipe.durations import parse_duration
from cmpt.recipe.paths import is_local, resolve_path
from cmpt.recipe.phases import PHASE_KEYS, apply_phase
from cmpt.recipe.schema import Recipe
from cmpt.recipe.suite import load_suite
from cmpt.recipe.typed import Absent, RecipeError, fault_line, nearest_choice, plain

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}

# Dotted key -> the condition that its value, or each of its values, meets; null passes where the schema allows it.
RANGES = {
    "run.seed": ">= 0",
    "run.keep_checkpoints": ">= 1",
    "run.keep_checkpoints_hours": ">= 0",
    "data.streams": ">= 1",
    "data.workers": ">= 1",
    "data.prefetch_batches": ">= 1",
    "data.max_image_pixels": ">= 1",
    "data.min_image_side": ">= 1",
    "data.max_image_bytes": ">= 1",
    "data.max_caption_characters": ">= 1",
    "data.cache_limit_bytes": "> 0",
    "data.fetch_workers": ">= 1",
    "data.fetch_attempts": ">= 1",
    "data.fetch_timeout_s": "> 0",
    "data.stall_s": "> 0",
    "decode.threads": ">= 1",
    "decode.hardware_share": ">= 0 and <= 1",
    "image.size": ">= 1",
    "image.crop_scale": "> 0 and <= 1",
    "image.crop_ratio": "> 0",
    "image.mean": ">= 0 and <= 1",
    "image.std": "> 0",
    "model.patch_size": ">= 1",
    "model.embed_dim": ">= 1",
    "model.vision.width": ">= 1",
    "model.vision.layers": ">= 1",
    "model.vision.heads": ">= 1",
    "model.vision.mlp_ratio": "> 0",
    "model.vision.layer_norm_eps": "> 0",
    "model.vision.layer_scale_init": "> 0",
    "model.text.width": ">= 1",
    "model.text.layers": ">= 1",
    "model.text.heads": ">= 1",
    "model.text.mlp_ratio": "> 0",
    "model.text.layer_norm_eps": "> 0",
    "model.text.layer_scale_init": "> 0",
    "model.context_length": ">= 3",  # start, one token, end
    "model.vocab_size": ">= 3",
    "model.temperature_init": "> 0",
    "model.logit_scale_max": "> 0",
    "masking.ratio": ">= 0 and < 1",
    "masking.ratio_end": ">= 0 and < 1",
    "masking.anchor_ratio": "> 0 and < 1",
    "masking.anchor_ratio_end": "> 0 and < 1",
    "masking.anchors": ">= 1",
    "masking.min_ratio": ">= 0 and < 1",
    "masking.min_ratio_end": ">= 0 and < 1",
    "masking.embedding_share": ">= 0 and <= 1",
    "masking.embedding_share_end": ">= 0 and <= 1",
    "masking.threshold": ">= -1 and <= 1",  # a Pearson correlation
    "text_masking.tokens": ">= 3",  # begin, one token, end
    "text_masking.threshold": "> 0 and <= 1",
    "optimizer.lr": "> 0",
    "optimizer.min_lr": ">= 0",
    "optimizer.betas": ">= 0 and < 1",
    "optimizer.eps": "> 0",
    "optimizer.weight_decay": ">= 0",
    "optimizer.clip_norm": "> 0",
    "optimizer.vision_layer_decay": "> 0 and <= 1",
    "optimizer.text_layer_decay": "> 0 and <= 1",
    "optimizer.ema_decay": ">= 0 and < 1",
    "loss.chunk_rows": ">= 1",
    "engine.batch_size": ">= 2",  # a contrast needs two pairs
    "engine.micro_batch_size": ">= 1",
    "engine.zero_stage": ">= 0 and <= 3",
    "engine.bucket_elements": ">= 1",
    "guard.spike": "> 0",
    "guard.window": ">= 8",
    "guard.limit": ">= 0",
    "guard.watchdog_seconds": ">= 3",
    "evaluation.batch_size": ">= 1",
}
CHOICES = {
    "tokenizer.kind": ("sentencepiece", "clip_bpe"),
    "data.caption_extension": ("txt", "json"),
    "data.cache": ("remote", "always", "never"),
    "data.broken_shards": ("skip", "stop"),
    "decode.backend": ("auto", "cpu", "dali"),
    "masking.strategy": ("cluster", "random", "centred", "block", "grid", "scores", "none"),
    "masking.constant_patches": ("alike", "unlike"),
    "masking.block": ("keep", "drop"),
    "text_masking.strategy": ("none", "truncate", "random", "block", "frequency"),
    "model.vision.pooling": ("class_token", "average"),
    "model.text.pooling": ("eos", "argmax"),
    "loss.kind": ("infonce", "sigmoid"),
    "engine.precision": ("bf16", "fp16", "fp32"),
    "guard.action": ("skip", "rewind", "stop"),
    "guard.unequal_weights": ("stop", "rewind"),
}
DURATIONS = (
    "run.duration",
    "run.log_every",
    "run.checkpoint_every",
    "run.stop_after",
    "guard.weights_every",
    "evaluation.every",
)
# Keys of a DeepSpeed configuration that are not the recipe's to pass through -> what says it instead.
OWNED_BY_FIELDS = {
    "train_batch_size": "engine.batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
}
# The same below zero_optimization, and what checkpoints and guards do not know.
ZERO_KEYS = {
    "stage": "is decided by engine.zero_stage",
    "overlap_comm": "is decided by engine.overlap_communication",
    "reduce_bucket_size": "is decided by engine.bucket_elements",
    "allgather_bucket_size": "is decided by engine.bucket_elements",
    "offload_optimizer": "is decided by engine.offload_optimizer",
    **dict.fromkeys(
        ("offload_param", "compute_grad_norm", "zero_hpz_partition_size", "mics_shard_size"), "is not supported"
    ),
}
MODEL_SIZES = (
    "model.patch_size",
    "model.embed_dim",
    *(f"model.{tower}.{name}" for tower in ("vision", "text") for name in ("width", "layers", "heads")),
)


class _Checker:
    def __init__(self, recipe: Recipe, world_size: int, origins: Mapping[str, str]) -> None:
        self.recipe = recipe
        self.world_size = world_size
        self.origins = origins
        self.scope = ""  # of what is checked now: " in phase ...", or "" for the recipe as a whole
        self.faults: dict[str, None] = {}  # in order, each once

    def fault(self, key: str, value: Any, constraint: str) -> None:
        owner = key
        while owner not in self.origins and "." in owner:
            owner = owner.rpartition(".")[0]
        origin = self.origins.get(owner, "")
        if fault_line(key, plain(value), constraint, origin) not in self.faults:
            line = fault_line(key, plain(value), constraint + self.scope, origin)
            self.faults[Absent(line) if isinstance(constraint, Absent) else line] = None

    def require(self, holds: bool, key: str, value: Any, constraint: str) -> None:
        if not holds:
            self.fault(key, value, constraint)

    def fields(self, recipe: Recipe, rename: Callable[[str], str], only: tuple[str, ...] | None = None) -> None:
        """Ranges, names and durations of single fields, and what must fit within one phase."""
        for key, condition in RANGES.items():
            value = _get(recipe, key)
            if (only is None or key in only) and value is not None and not _meets(value, condition):
                self.fault(rename(key), value, f"must be {condition}")
        for key, choices in CHOICES.items():
            if (only is None or key in only) and _get(recipe, key) not in choices:
                self.fault(rename(key), _get(recipe, key), nearest_choice(_get(recipe, key), choices))
        self.duration(rename("optimizer.warmup"), recipe.optimizer.warmup, zero_allowed=True)
        image, optimizer, patch = recipe.image, recipe.optimizer, recipe.model.patch_size
        for key, value, constraint in (*masking_faults(recipe), *text_masking_faults(recipe)):
            self.fault(rename(key), value, constraint)
        if patch and image.size > 0:
            constraint = f"must be a multiple of model.patch_size = {patch}"
            self.require(image.size % patch == 0, rename("image.size"), image.size, constraint)
        low_high = (("image.crop_scale", image.crop_scale), ("image.crop_ratio", image.crop_ratio))
        for key, (low, high) in low_high:
            self.require(low <= high, rename(key), (low, high), "the first must be <= the second")
        constraint = f"must be <= optimizer.lr = {optimizer.lr}"
        self.require(not optimizer.min_lr > optimizer.lr, rename("optimizer.min_lr"), optimizer.min_lr, constraint)

    def duration(self, key: str, text: str | None, zero_allowed: bool = False) -> None:
        if text is None:
            return
        try:
            amount = parse_duration(text).amount
        except ValueError as error:
            self.fault(key, text, str(error))
            return
        self.require(zero_allowed or amount > 0, key, text, "must be above 0")

    def run(self) -> None:
        run, listed = self.recipe.run, self.recipe.phases
        for key in DURATIONS:
            self.duration(key, _get(self.recipe, key))
        if listed:
            self.require(run.duration is None, "run.duration", run.duration, "must be null where phases are given")
        else:
            self.require(run.duration is not None, "run.duration", None, "must be given where there are no phases")
        parts = re.split(r"[/\\]", run.name)
        safe = all(re.fullmatch(r"[\w.+=@-]+", part) and part not in (".", "..") for part in parts)
        self.require(safe, "run.name", run.name, "must be a plain folder name of letters, digits and . _ + = @ -")
        self.require(run.folder != "", "run.folder", run.folder, "must not be empty")

    def phases(self) -> None:
        names: set[str] = set()
        for index, phase in enumerate(self.recipe.phases):
            key = f"phases.{index}"
            self.duration(f"{key}.duration", phase.duration)
            unique = not phase.name or phase.name not in names
            self.require(unique, f"{key}.name", phase.name, "must differ from the names of the other phases")
            names.add(phase.name)
            in_phase = replace(self.recipe, **apply_phase(self.recipe, phase, f"{key}.set", self.fault))
            prefixes = {name: f"{key}.set.{name}" for name in phase.set}
            self.scope = f' in phase "{phase.name or index + 1}"'
            self.fields(in_phase, lambda name, prefixes=prefixes: prefixes.get(name, name), PHASE_KEYS)  # type: ignore[misc]
            self.scope = ""

    def model(self) -> None:
        model = self.recipe.model
        for key in MODEL_SIZES:
            self.require(_get(self.recipe, key) is not None, key, None, "must be given, or a model.preset that has it")
        for name, tower in (("vision", model.vision), ("text", model.text)):
            if tower.width and tower.heads and tower.heads > 0:
                constraint = f"must divide model.{name}.width = {tower.width}"
                self.require(tower.width % tower.heads == 0, f"model.{name}.heads", tower.heads, constraint)
        if model.temperature_init > 0:
            constraint = f"1 / this must be <= model.logit_scale_max = {model.logit_scale_max}"
            fits = 1 / model.temperature_init <= model.logit_scale_max * (1 + 1e-9)
            self.require(fits, "model.temperature_init", model.temperature_init, constraint)
        with_bias, given = self.recipe.loss.kind == "sigmoid", model.logit_bias_init is not None
        constraint = f"must be {'given' if with_bias else 'null'} with loss.kind = {self.recipe.loss.kind}"
        self.require(with_bias == given, "model.logit_bias_init", model.logit_bias_init, constraint)
        run = self.recipe.run
        started = os.path.isdir(os.path.join(os.path.expanduser(run.folder), run.name, "checkpoints"))
        if model.init_from is not None and not started and not os.path.exists(resolve_path(model.init_from)):
            self.fault("model.init_from", model.init_from, Absent("no such file or folder"))

    def engine(self) -> None:
        engine, run = self.recipe.engine, self.recipe.run
        for key, field in OWNED_BY_FIELDS.items():
            if key in engine.deepspeed:
                self.fault(f"engine.deepspeed.{key}", engine.deepspeed[key], f"is decided by {field}")
        zero = engine.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            self.fault("engine.deepspeed.zero_optimization", zero, "must be a section (name: value)")
            zero = {}
        for key, constraint in ZERO_KEYS.items():
            if key in zero:
                self.fault(f"engine.deepspeed.zero_optimization.{key}", zero[key], constraint)
        if engine.offload_optimizer:
            constraint = "must be >= 1 with engine.offload_optimizer"
            self.require(engine.zero_stage >= 1, "engine.zero_stage", engine.zero_stage, constraint)
        copies = run.copy_checkpoints_to
        if copies is not None:
            own = os.path.abspath(os.path.join(os.path.expanduser(run.folder), run.name))
            theirs = os.path.abspath(os.path.join(os.path.expanduser(copies), run.name))
            apart = copies != "" and os.path.commonpath([own, theirs]) not in (own, theirs)
            self.require(apart, "run.copy_checkpoints_to", copies, "must be a folder outside of the run's")

    def split(self) -> None:
        streams, batch_size, world_size = self.recipe.data.streams, self.recipe.engine.batch_size, self.world_size
        if streams < 1:
            return  # reported as a range
        constraint = f"must be a multiple of data.streams = {streams}"
        self.require(batch_size % streams == 0, "engine.batch_size", batch_size, constraint)
        constraint = f"must be a multiple of the number of processes = {world_size}"
        self.require(streams % world_size == 0, "data.streams", streams, constraint)

    def data(self) -> None:
        data, tokenizer, evaluation = self.recipe.data, self.recipe.tokenizer, self.recipe.evaluation
        for key, value, constraint in data_faults(data):
            self.fault(key, value, constraint)
        if tokenizer.path is not None:
            missing = is_local(tokenizer.path) and not os.path.isfile(resolve_path(tokenizer.path))
            self.require(not missing, "tokenizer.path", tokenizer.path, Absent("no such file"))
        elif tokenizer.kind == "sentencepiece":
            self.fault("tokenizer.path", None, "must name the .model file of the sentencepiece tokenizer")
        elif tokenizer.kind == "clip_bpe" and find_spec("open_clip") is None:
            constraint = "must name CLIP's bpe_simple_vocab_16e6.txt.gz; null needs open_clip_torch, not installed here"
            self.fault("tokenizer.path", None, Absent(constraint))
        if evaluation.suite is not None:
            self.suite(evaluation.suite, evaluation.tasks)
        elif evaluation.tasks:
            self.fault("evaluation.tasks", evaluation.tasks, "belongs to evaluation.suite, which is null")
        for prompt in evaluation.prompts:
            self.require(_is_template(prompt), "evaluation.prompts", prompt, "must hold {}, the place of the category")
        if data.category_field is not None:
            self.require(bool(evaluation.prompts), "evaluation.prompts", [], "must not be empty with a category_field")

    def suite(self, path: str, chosen: list[str]) -> None:
        if not os.path.isfile(resolve_path(path)):
            self.fault("evaluation.suite", path, Absent("no such file"))
            return
        try:
            names = [task.name for task in load_suite(path).tasks]
        except RecipeError as error:
            for fault in error.faults:
                self.fault("evaluation.suite", path, fault)
            return
        for name in chosen:
            self.require(name in names, "evaluation.tasks", name, nearest_choice(name, names))


def check_recipe(recipe: Recipe, world_size: int = 1, origins: Mapping[str, str] | None = None) -> list[str]:
    """Faults of a typed recipe that `world_size` processes are to run, one line each; empty: it can run.

    A line about what is only not on this machine is `Absent`. `origins` (of `load_recipe`), where given, adds to each
    line where the value came from.
    """
    checker = _Checker(recipe, world_size, origins or {})
    checker.run()
    checker.fields(recipe, lambda key: key)
    checker.phases()
    checker.model()
    checker.engine()
    checker.split()
    checker.data()
    return list(checker.faults)


def check_model(recipe: Recipe, origins: Mapping[str, str] | None = None) -> list[str]:
    """The part of `check_recipe` that is not about data and a run, for models that are only evaluated."""
    checker = _Checker(recipe, 1, origins or {})
    checker.fields(recipe, lambda key: key)
    checker.model()
    return list(checker.faults)


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _is_template(prompt: str) -> bool:
    """Whether `prompt.format(category)` works and has the category in it."""
    try:
        return prompt.format("cat") != prompt.format("dog")
    except (ValueError, LookupError):
        return False


def _meets(value: Any, condition: str) -> bool:
    values = value if isinstance(value, tuple | list) else [value]
    bounds = [bound.split() for bound in condition.split(" and ")]
    return all(
        math.isfinite(item) and all(_HOLDS[sign](item, float(bound)) for sign, bound in bounds) for item in values
    )
