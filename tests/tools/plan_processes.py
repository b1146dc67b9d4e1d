"""Real training steps for the tests of plan.py: what is planned of them, and what really was.

    [torchrun --nproc-per-node W] tests/tools/plan_processes.py CASE       memory; CASE is JSON
    torchrun --nproc-per-node W tests/tools/plan_processes.py --calls CASES     collectives; CASES is a list
    python tests/tools/plan_processes.py --train CASE                       what is planned of cmpt/train.py

CASE: preset, layers, image_size, vocabulary, pairs (per rank), kept, words, equal (lengths), stage, checkpointing,
micro, precision, loss, ema, bucket, zero (a section of DeepSpeed's).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch  # noqa: E402

from cmpt.batch import PackedPatches, PackedText  # noqa: E402
from cmpt.dist import process_group, traffic  # noqa: E402
from cmpt.engine.build import COMPUTE_DTYPES, build  # noqa: E402
from cmpt.engine.step import find_gradient, take_step  # noqa: E402
from cmpt.engine.traffic import count_deepspeed  # noqa: E402
from cmpt.models.clip import CLIP  # noqa: E402
from cmpt.monitor.meters import peak_resident_bytes, proc_bytes  # noqa: E402
from cmpt.recipe.presets import PRESETS  # noqa: E402
from cmpt.recipe.schema import Engine, Loss, Model, Optimizer  # noqa: E402
from plan_memory import FP32, INPUTS, PATCHES, WEIGHTS, Largest, Sharding  # noqa: E402
from plan_run import zero_calls  # noqa: E402

STEPS = 3  # ZeRO 3 records the order of the modules in the first two


def model_of(case: dict[str, Any]) -> Model:
    model = Model(
        vocab_size=case["vocabulary"],
        context_length=case.get("context", 77),
        activation_checkpointing=case.get("checkpointing", False),
    )
    for key, value in PRESETS[case["preset"]].items():
        *owner, field = key.split(".")
        setattr(getattr(model, owner[0]) if owner else model, field, value)
    for tower in (model.vision, model.text):
        tower.layers = case.get("layers", tower.layers)
    if case.get("loss") == "sigmoid":
        model.logit_bias_init = -10.0
    return model


def lengths_of(mean: int, pairs: int, equal: bool) -> list[int]:
    """Longest first; or of two kinds, which is what a CPU's attention treats otherwise."""
    return [mean] * pairs if equal else [mean + 1] * (pairs // 2) + [mean - 1] * (pairs - pairs // 2)


def batch_of(case: dict[str, Any], model: Model) -> tuple[PackedPatches, PackedText]:
    pairs, equal = case["pairs"], case.get("equal", True)
    kept, words = (lengths_of(case[name], pairs, equal) for name in ("kept", "words"))
    side = case["image_size"] // (model.patch_size or 1)
    patches_TP = torch.randn(sum(kept), 3 * (model.patch_size or 1) ** 2)
    places = torch.cat([torch.arange(length) for length in kept])
    ids_U = torch.randint(0, case["vocabulary"], (sum(words),))
    positions = torch.cat([torch.arange(length) for length in words])
    order_B = torch.arange(pairs)
    return PackedPatches(patches_TP, places, kept, order_B, (side, side)), PackedText(ids_U, positions, words, order_B)


def largest_of(case: dict[str, Any], world_size: int) -> tuple[Largest, Sharding]:
    model, settings = model_of(case), engine_of(case, world_size)
    equal, side = case.get("equal", True), case["image_size"] // (model.patch_size or 1)
    largest = Largest(
        model,
        Loss(kind=case.get("loss", "infonce")),
        case["image_size"],
        (side, side),
        COMPUTE_DTYPES[settings.precision],
        False,
        lambda pairs: lengths_of(case["kept"], pairs, equal),
        lambda pairs: lengths_of(case["words"], pairs, equal),
        case["pairs"],
    )
    return largest, Sharding(largest.groups, settings, world_size, bool(case.get("ema")), touched=True)


def planned(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    largest, sharding = largest_of(case, world_size)
    patches = FP32 * case["pairs"] * case["kept"] * 3 * (largest.model.patch_size or 1) ** 2
    peak = largest.peak(sharding, case["pairs"], case.get("micro"), {PATCHES: patches})
    return {"bytes": peak.bytes, "when": peak.when, "parts": {**peak.parts}, "batch": peak.parts[INPUTS]}


def engine_of(case: dict[str, Any], world_size: int) -> Engine:
    settings = Engine(
        batch_size=case["pairs"] * world_size,
        micro_batch_size=case.get("micro"),
        precision=case.get("precision", "bf16"),
        zero_stage=case["stage"],
    )
    settings.bucket_elements = case.get("bucket", settings.bucket_elements)
    settings.deepspeed = {"zero_optimization": case["zero"]} if "zero" in case else {}
    return settings


def measured(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Most resident memory of a few steps, above that of the process just before the model was made."""
    small = {**case, "preset": "tiny-8", "image_size": 32, "pairs": 4, "kept": 8, "words": 8}
    list(train(small, world_size))  # libraries take what they take once
    before = proc_bytes("self/status", "VmRSS")
    list(train(case, world_size))
    return {"bytes": peak_resident_bytes() - before, "before": before}


def train(case: dict[str, Any], world_size: int) -> Iterator[int]:
    """A few steps, one at a time."""
    model = model_of(case)
    clip = CLIP(model, case["image_size"])
    optimizer = Optimizer(ema_decay=case.get("ema"))
    trained = build(clip, engine_of(case, world_size), optimizer, world_size, torch.device("cpu"))
    count_deepspeed()
    images, text = batch_of(case, model)
    for step in range(STEPS):
        result = find_gradient(trained, images, text, None, Loss(kind=case.get("loss", "infonce")), case.get("micro"))
        take_step(trained, result, 1e-4, None)
        yield step


def collectives(case: dict[str, Any], world_size: int) -> dict[str, dict[str, float]]:
    """Of the last step, by kind."""
    calls: Counter[str] = Counter()
    real, last = traffic.collective, {}

    def counting(kind: str, sent_bytes: int) -> AbstractContextManager[None]:
        calls[kind] += 1
        return real(kind, sent_bytes)

    with mock.patch.object(traffic, "collective", counting):
        for _ in train(case, world_size):
            last = dict(calls)
            calls.clear()
    parts = -(-case["pairs"] // case.get("micro", case["pairs"]))
    return {"planned": zero_calls(largest_of(case, world_size)[1], parts), "counted": last}


def planned_of_training(case: dict[str, Any]) -> float:
    """Of cmpt/train.py from the quickstart's data: its dry run, or its steps, in which images differ; with the buffers
    of its checkpoints, which are there before the dry run."""
    dry = planned(case | {"kept": 100, "words": case["context"]}, 1)
    steps = planned(case | {"kept": 72, "words": 7, "equal": False}, 1)
    return max(dry["bytes"], steps["bytes"]) + 3 * dry["parts"][WEIGHTS]


def main() -> None:
    if sys.argv[1] == "--train":
        print(planned_of_training(json.loads(sys.argv[2])), flush=True)
        return
    rank, world_size, _ = process_group.start()
    if sys.argv[1] == "--calls":
        result: Any = [collectives(case, world_size) for case in json.loads(sys.argv[2])]
    else:
        case = json.loads(sys.argv[1])
        real = measured(case, rank, world_size)
        result = {"planned": planned(case, world_size), "measured": real} if rank == 0 else None
    if rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    process_group.stop()


if __name__ == "__main__":
    main()
