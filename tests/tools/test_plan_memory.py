from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli, unused_port

from cmpt.models.clip import CLIP, parameter_groups
from cmpt.recipe.schema import Engine, Loss, Model, Text, Vision
from plan_activations import LiveBytes, loss_bytes, meta_model, packed, total, tower_passes
from plan_memory import Largest, Sharding
from plan_run import CONTROL_CALLS, FEATURE_CALLS

# Memory that is given back is to leave the process at once, so that what is resident is what is allocated.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
WITHIN = 0.10
SHORT = {
    "preset": "ViT-S-16",
    "layers": 2,
    "image_size": 224,
    "vocabulary": 60_000,
    "pairs": 24,
    "kept": 98,
    "words": 16,
}
LONG = {"preset": "ViT-S-16", "image_size": 224, "vocabulary": 20_000, "pairs": 16, "kept": 137, "words": 32}
MODEL = Model(
    patch_size=8,
    embed_dim=24,
    vision=Vision(width=32, layers=2, heads=2),
    text=Text(width=16, layers=2, heads=2),
    context_length=8,
    vocab_size=50,
)


def found(run_cli: RunCli, world: int, *arguments: str) -> Any:
    script = ["tests/tools/plan_processes.py", *arguments]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(unused_port())]
    ended = run_cli(["python", *(launcher if world > 1 else []), *script], env=ALLOCATOR, timeout=900)
    assert ended.returncode == 0, ended.stderr
    return json.loads(next(line[7:] for line in ended.stdout.splitlines() if line.startswith("RESULT ")))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "case"),
    [
        (1, SHORT | {"stage": 0}),
        (2, SHORT | {"stage": 2}),
        *(
            pytest.param(world, LONG | settings, marks=pytest.mark.slow)
            for world, settings in (
                (2, {"stage": 0}),
                (2, {"stage": 1}),
                (2, {"stage": 2}),
                (2, {"stage": 3}),
                (1, {"stage": 0, "pairs": 32, "checkpointing": True}),
                (1, {"stage": 0, "pairs": 32, "micro": 8}),
                (2, {"stage": 1, "micro": 4}),
                (2, {"stage": 2, "micro": 4}),
                (2, {"stage": 3, "micro": 4}),
                (1, {"stage": 0, "precision": "fp32"}),
                (1, {"stage": 0, "equal": False}),
                (2, {"stage": 2, "pairs": 48}),
                (2, {"stage": 2, "bucket": 10_000_000}),
                (2, {"stage": 1, "bucket": 10_000_000, "ema": 0.99}),
                (2, {"stage": 3, "pairs": 32, "checkpointing": True}),
                (2, {"stage": 1, "loss": "sigmoid"}),
            )
        ),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items() if k not in LONG) if isinstance(value, dict) else None
    ),
)
def test_planned_memory_is_that_of_a_run(run_cli: RunCli, world: int, case: dict[str, Any]) -> None:
    """The most resident memory of training steps, above that of the process before the model was made."""
    result = found(run_cli, world, json.dumps(case))
    planned, measured = result["planned"], result["measured"]["bytes"]
    assert measured > 300 * 2**20, "too little for the noise of a process"
    assert planned["bytes"] == pytest.approx(measured, rel=WITHIN), planned


@pytest.mark.multiprocess
def test_planned_collectives_are_those_of_a_step(run_cli: RunCli) -> None:
    """Every ZeRO stage, smaller buckets, and gradient caching; control: the training loop has one more."""
    small = {**SHORT, "layers": 3, "image_size": 64, "vocabulary": 2000, "pairs": 4, "kept": 8, "words": 8}
    zero: list[dict[str, Any]] = [{"stage3_prefetch_bucket_size": 2_000_000}, {"stage3_param_persistence_threshold": 0}]
    cases = [{"stage": stage} for stage in (0, 1, 2, 3)] + [
        {"stage": stage, "bucket": 2_000_000} for stage in (1, 2, 3)
    ]
    cases += [{"stage": 3, "zero": section} for section in zero] + [{"stage": 3, "micro": micro} for micro in (1, 2)]
    results = found(run_cli, 2, "--calls", json.dumps([small | case for case in cases]))
    for case, result in zip(cases, results, strict=True):
        counted = result["counted"]
        assert counted.pop("features") == FEATURE_CALLS and counted.pop("control") == CONTROL_CALLS - 1
        for kind, calls in result["planned"].items():
            assert counted.get(kind, 0) == pytest.approx(calls, abs=1), (case, result)


def test_live_bytes_are_those_of_tensors_that_are_alive() -> None:
    with LiveBytes() as live:
        kept = torch.empty(100, device="meta")
        view = kept[:10]
        passing = kept + 1
        del passing
        other = torch.empty(50, dtype=torch.bfloat16, device="meta")
    assert total(live.now) == 400 + 100
    assert total(live.peak) == 800
    del kept
    assert total(live.now) == 500, "the view keeps it"
    del view, other
    assert total(live.now) == 0


def test_saved_activations_are_those_that_autograd_keeps() -> None:
    """Counted on the meta device, and packed by the real model's own backward graph."""
    lengths, words = [9, 9, 9], [5, 5, 5]
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clip = CLIP(MODEL, 32)
    images, text = packed(MODEL, lengths, words, (4, 4), torch.float32)
    counted = tower_passes(meta_model(MODEL, 32, torch.float32, False), images, text, False)
    real_images = type(images)(torch.randn(27, 192), torch.arange(9).repeat(3), lengths, torch.arange(3), images.grid)
    real_text = type(text)(torch.zeros(15, dtype=torch.int64), torch.arange(5).repeat(3), words, torch.arange(3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = clip(real_images, real_text, 3)
    for tensor in (*clip.parameters(), real_images.patches_TP):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    for tensor in (
        real_text.ids_U,
        real_text.position_U,
        real_images.position_T,
        real_text.order_B,
        real_images.order_B,
    ):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    outside = sum(output.untyped_storage().nbytes() for output in outputs if output is not None)
    assert total(counted.end) == pytest.approx(sum(sizes.values()) + outside, rel=0.05)


def test_gradients_come_once_each_and_leave_nothing() -> None:
    images, text = packed(MODEL, [9] * 3, [5] * 3, (4, 4), torch.float32)
    passes = tower_passes(meta_model(MODEL, 32, torch.bfloat16, True), images, text, True)
    names = [name for name, _ in CLIP(MODEL, 32).named_parameters()]
    assert sorted(interval.parameter for interval in passes.backward) == sorted(names)
    assert total(passes.backward[-1].live) < 0.05 * total(passes.end)


def test_flash_attention_keeps_no_weights_and_a_cpu_does() -> None:
    images, text = packed(MODEL, [16] * 8, [5] * 8, (4, 4), torch.float32)
    longer, _ = packed(MODEL, [64] * 8, [5] * 8, (8, 8), torch.float32)

    def grown(flash: bool) -> float:
        clip = meta_model(MODEL, 64, torch.float32, flash)
        return total(tower_passes(clip, longer, text, flash).end) / total(tower_passes(clip, images, text, flash).end)

    assert grown(True) < 65 / 17 < grown(False)


def test_the_loss_takes_what_its_docstring_says() -> None:
    """Chunk, gradients and gathered features: losses/contrastive.py and sigmoid.py."""
    rows, embed, world = 64, 32, 8
    batch = rows * world
    arithmetic = 4 * (16 * batch + 2 * (rows + batch) * embed) + 4 * 2 * batch * embed
    assert loss_bytes(Loss(chunk_rows=16), rows, embed, world) == pytest.approx(arithmetic, rel=0.25)
    more = loss_bytes(Loss(chunk_rows=64), rows, embed, world) - loss_bytes(Loss(chunk_rows=16), rows, embed, world)
    assert more == pytest.approx(4 * 48 * batch, rel=0.1)


def sharding(stage: int, world: int, **more: Any) -> Sharding:
    groups = [{n: p.numel() for n, p in group.items()} for group in parameter_groups(CLIP(MODEL, 32)).values()]
    return Sharding(groups, Engine(zero_stage=stage, **more), world, averaged=False, touched=False)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_state_is_a_share_of_the_whole(stage: int) -> None:
    """ZeRO, arXiv 1910.02054: masters and moments at every stage, weights at stage 3."""
    device, host = sharding(stage, 4).standing()
    elements = sharding(stage, 4).elements
    assert device["moments"] == pytest.approx(8 * elements / 4, rel=0.05) and not host
    assert device["weights"] == pytest.approx(4 * elements / (4 if stage == 3 else 1), rel=0.05)


def test_offloaded_state_is_on_the_host() -> None:
    device, host = sharding(2, 4, offload_optimizer=True).standing()
    assert "moments" not in device and host["moments"] > 0


def test_buckets_are_taken_whole_on_a_gpu_and_twice_where_reduction_overlaps() -> None:
    assert sharding(1, 2, bucket_elements=1000).buckets(10) == 1000
    assert sharding(2, 2, bucket_elements=1000).buckets(10) == 2 * 1000
    assert sharding(2, 2, bucket_elements=1000, overlap_communication=False).buckets(10) == 1000
    whole = sharding(1, 2)
    assert whole.elements <= whole.buckets(10) <= whole.elements + 1, "no larger than the model, and even"


def test_three_counts_stand_for_all_and_are_never_too_low() -> None:
    largest = Largest(
        MODEL, Loss(), 32, (4, 4), torch.bfloat16, True, lambda pairs: [9] * pairs, lambda pairs: [5] * pairs, 64
    )
    between = largest.passes(32)
    images, text = packed(MODEL, [9] * 32, [5] * 32, (4, 4), torch.float32)
    counted = tower_passes(largest.clip, images, text, True)
    assert total(between.end) == pytest.approx(total(counted.end), rel=1e-6)
    for one, other in zip(between.backward, counted.backward, strict=True):
        assert total(other.peak) * 0.9999 <= total(one.peak) <= total(other.peak) * 1.1, one.parameter


@pytest.mark.slow
@pytest.mark.multiprocess
def test_planned_memory_is_that_of_training_from_shards(run_cli: RunCli, tmp_path: Path) -> None:
    """cmpt/train.py itself, a large model against a small one: what both have beside the model is not planned."""
    common = [
        "run.duration=3 steps",
        "guard.weights_every=null",
        "engine.batch_size=48",
        "data.workers=1",
        "data.prefetch_batches=1",
    ]
    common += ["evaluation.every=null", "data.heldout=[]", f"run.folder={tmp_path}", "data.category_field=null"]
    peaks = {}
    for preset in ("ViT-S-8", "tiny-8"):
        told = ["recipes/quickstart.yaml", f"run.name={preset}", f"model.preset={preset}", "model.vocab_size=40000"]
        ended = run_cli(["python", "cmpt/train.py", *told, *common], env=ALLOCATOR, timeout=900)
        assert ended.returncode == 0, ended.stderr
        rows = (tmp_path / preset / "metrics.jsonl").read_text().splitlines()
        peaks[preset] = json.loads(rows[-1])["peak_memory_bytes"]
    case = {"image_size": 96, "vocabulary": 40_000, "pairs": 48, "stage": 0, "context": 32}
    planned = {}
    for preset in peaks:
        ended = run_cli(["python", "tests/tools/plan_processes.py", "--train", json.dumps(case | {"preset": preset})])
        assert ended.returncode == 0, ended.stderr
        planned[preset] = json.loads(ended.stdout.splitlines()[-1])
    larger, smaller = (planned[preset] for preset in ("ViT-S-8", "tiny-8"))
    assert larger - smaller == pytest.approx(peaks["ViT-S-8"] - peaks["tiny-8"], rel=WITHIN), (planned, peaks)
