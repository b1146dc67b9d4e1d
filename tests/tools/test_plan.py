from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import gpus
from cmpt.engine.traffic import expected_bytes, parameter_sizes
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops, training_flops
from plan import main, parser, planned
from plan_run import Job, nearest_counts
from plan_tables import MemoryTable, as_json, tables
from plan_warnings import warnings
from step_model import COMMUNICATION

SMALL = [
    "recipes/quickstart.yaml",
    "--gpu=h100",
    "--nodes=2",
    "--gpus-per-node=4",
    "--samples-per-epoch=4305",
    "model.vision.layers=1",
    "model.text.layers=1",
]


def options(*more: str) -> argparse.Namespace:
    return parser().parse_intermixed_args([*SMALL, *more])


def job(*more: str) -> Job:
    return planned(options(*more))[0]


def said(*more: str) -> str:
    found = job(*more)
    return "\n".join(warnings(found, MemoryTable.of(found)))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert not told.out and all(line.startswith("error: ") for line in told.err.splitlines())
    return told.err


def test_parameters_are_those_of_the_real_model() -> None:
    plan = job()
    clip = CLIP(plan.recipe.model, plan.recipe.image.size)
    assert plan.elements == sum(parameter.numel() for parameter in clip.parameters())
    assert plan.parameters["visual"] == sum(parameter.numel() for parameter in clip.visual.parameters())
    assert plan.sizes == parameter_sizes(clip)


def test_flops_are_those_that_training_logs() -> None:
    plan = job("model.activation_checkpointing=true", "--caption-tokens=9")
    expected = training_flops(plan.recipe.model, [72], [9], 128)
    assert plan.phase_plans[0].kept == 72, "half of 144"
    assert plan.phase_plans[0].flops == pytest.approx(expected)
    cached = job("engine.micro_batch_size=4", "--caption-tokens=9")
    expected = training_flops(cached.recipe.model, [72], [9], 128, cached=True)
    assert cached.phase_plans[0].flops == pytest.approx(expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_are_those_that_are_expected(stage: int) -> None:
    plan = job(f"engine.zero_stage={stage}")
    clip = CLIP(plan.recipe.model, plan.recipe.image.size)
    sizes = parameter_sizes(clip)
    embed = plan.recipe.model.embed_dim or 0
    assert plan.sent_bytes(stage) == expected_bytes(
        sizes, world_size=8, zero_stage=stage, batch_size=128, embed_dim=embed, loss="infonce"
    )


def test_steps_hours_and_cost_follow_from_the_step() -> None:
    plan = job("run.duration=2 epochs", "--price-per-gpu-hour=2")
    assert plan.steps == 68, "2 * 4305 / 128, rounded up"
    assert plan.hours == pytest.approx(68 * plan.phase_plans[0].step_s / 3600)
    found = as_json(plan, MemoryTable.of(plan), [])
    assert found["cost"] == pytest.approx(plan.hours * 8 * 2)
    assert found["checkpoint_bytes"] == 12 * plan.elements


def test_average_of_weights_is_in_the_checkpoint() -> None:
    assert job("optimizer.ema_decay=0.99").checkpoint_bytes == 16 * job().elements


def test_each_phase_has_its_own_tokens() -> None:
    plan = planned(
        parser().parse_intermixed_args(
            ["recipes/vitl14_laion.yaml", "--gpu=h200", "--nodes=64", "model.vision.layers=1", "model.text.layers=1"]
        )
    )[0]
    assert [phase.kept for phase in plan.phase_plans] == [128, 256]
    assert plan.largest_batch.kept == 256, "memory is that of the unmasked phase"


def test_a_faster_machine_can_be_passed_in() -> None:
    plan = job()
    quick = Job(plan.recipe, plan.cluster, 20, 1e3, 1, job("--mfu=0.42").machine)
    assert quick.phase_plans[0].terms["compute"] == pytest.approx(plan.phase_plans[0].terms["compute"] / 2)


def test_peaks_are_those_of_the_flops_table() -> None:
    for name, device in (("h200", "NVIDIA H200"), ("h100", "NVIDIA H100 80GB HBM3"), ("a100", "NVIDIA A100-SXM4-80GB")):
        assert gpus.find_gpu(name).peak_bf16_flops == peak_flops(device)


def test_report_needs_no_data_and_says_how_each_figure_came_about(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    absent = ["data.train.0.urls=['nowhere/{000..099}.tar']", "data.heldout=[]", f"--json={out}"]
    assert main([*SMALL, *absent]) == 0
    text = capsys.readouterr().out
    assert "assumed" in text and "computed" in text and "measured, bench_loader.py" in text and "data sheet" in text
    assert "Not at hand on this machine" in text
    found = json.loads(out.read_text())
    assert {entry["zero_stage"] for entry in found["memory"]} == {0, 1, 2, 3}
    assert found["phases"][0]["images_per_s"] > 0


def test_markdown_tables_have_as_many_cells_in_every_row() -> None:
    plan = job()
    for table in tables(plan, MemoryTable.of(plan)):
        lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1, table.title


def test_warns_where_streams_do_not_divide_and_names_the_nearest() -> None:
    told = said("--nodes=3")
    assert "12 GPUs do not divide data.streams = 16" in told and "2 nodes or 4 nodes" in told
    assert "does not divide by 12 GPUs" in told
    assert "do not divide" not in said()
    assert nearest_counts(16, 12, 4) == [8, 16]


def test_a_batch_that_does_not_divide_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--nodes=3"]) == 1
    assert "the recipe cannot run so: data.streams = 16" in capsys.readouterr().out


def test_warns_of_few_shards() -> None:
    assert "fewer than data.streams" in said()
    assert "fewer than 16 GPUs" in said("--nodes=4")
    assert "shards" not in said("data.train.0.urls=['nowhere/{000..099}.tar']", "data.heldout=[]")


def test_warns_of_a_batch_that_does_not_fit_and_says_which_does() -> None:
    plan = job("engine.bucket_elements=1000000", "model.preset=ViT-B-16", "engine.batch_size=2048")
    table = MemoryTable.of(plan)
    whole, part = table.own.bytes, table.peaks[1, 16].bytes
    assert part < whole
    limit = (whole + part) / 2 / 2**30
    told = said(
        "engine.bucket_elements=1000000", "model.preset=ViT-B-16", "engine.batch_size=2048",
        f"--memory-gib={limit}", "--reserve-gib=0",
    )  # fmt: skip
    assert "does not fit" in told and "engine.micro_batch_size=" in told
    assert "no micro-batch fits" in said("--memory-gib=0.01", "--reserve-gib=0")


def test_warns_of_a_micro_batch_that_is_not_needed() -> None:
    assert "is not needed" in said("engine.micro_batch_size=4")
    assert "is not needed" not in said()


def test_warns_where_stage_3_buys_nothing() -> None:
    """With gradient caching it gathers for every part; without, DeepSpeed's stages 1 and 2 move more than it does."""
    assert "stage 3 buys nothing: stage 1 fits too" in said("engine.zero_stage=3", "engine.micro_batch_size=4")
    assert "stage 3 is not needed for memory: stage 1 fits too" in said("engine.zero_stage=3")
    assert "stage 3" not in said("engine.zero_stage=2")


def test_a_bucket_is_no_larger_than_the_model() -> None:
    whole, part = job(), job("engine.bucket_elements=1000000")
    assert whole.elements <= whole.zero["reduce_bucket_size"] <= whole.elements + 1 < 500_000_000
    assert part.zero["reduce_bucket_size"] == part.zero["allgather_bucket_size"] == 1_000_000


def test_warns_of_a_slow_loader_and_slow_storage() -> None:
    assert "loader is too slow" in said("--cores-per-gpu=1")
    assert "loader is too slow" not in said("--cores-per-gpu=1000")
    assert "reading is too slow" in said("--storage-gb-per-s=0.001")
    assert "reading is too slow" not in said()


def test_warns_where_the_network_bounds_the_step() -> None:
    assert "network-bound" in said("--network-gbit-per-node=1")
    assert "network-bound" not in said("--nodes=1", "--gpus-per-node=1")


def test_warns_of_checkpoints_that_come_too_often_or_too_seldom() -> None:
    assert "some would be left out" in said("--storage-gb-per-s=0.0001", "run.checkpoint_every=1 step")
    slow = ["--mfu=1e-10", "run.checkpoint_every=300 steps"]
    assert "GPU hours on average" in said(*slow)
    assert "hold training up" in said("run.checkpoint_every=1 step", "--nodes=1", "--gpus-per-node=1", "--mfu=1")


def test_one_gpu_runs_as_stage_0() -> None:
    plan = job("--nodes=1", "--gpus-per-node=1")
    assert plan.stage() == 0 and sum(plan.sent_bytes(0).values()) == 0
    assert all(plan.phase_plans[0].terms[kind] == 0 for kind in COMMUNICATION)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--gpu=h20"], "--gpu h20: unknown; must be one of h200"),
        (["--nodes=0"], "--nodes 0: must be above 0"),
        (["--gpus-per-node=-1"], "--gpus-per-node -1: must be above 0"),
        (["--mfu=0"], "--mfu 0: must be above 0 and at most 1"),
        (["--mfu=30"], "--mfu 30: must be above 0 and at most 1"),
        (["--caption-tokens=nan"], "--caption-tokens nan: must be above 0"),
        (["--reserve-gib=-1"], "--reserve-gib -1: must not be negative"),
        (["--reserve-gib=500"], "leaves no memory"),
        (["--gpu=l40s"], "--network-gbit-per-node: must be given"),
        (["engine.zero_stge=1"], "zero_stage"),
        (["engine.zero_stage=7"], "engine.zero_stage = 7: must be >= 0 and <= 3"),
        (["tokenizer.path=nowhere.model"], "model.vocab_size=N"),
    ],
)
def test_bad_input_is_said_in_a_line(capsys: pytest.CaptureFixture[str], given: list[str], told: str) -> None:
    assert told in refused(capsys, *SMALL, *given)


def test_unknown_recipe_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in refused(capsys, "nowhere.yaml", "--gpu=h100")


def test_epochs_need_the_number_of_samples(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "recipes/vitb16_cc12m.yaml", "--gpu=h100")
    assert 'run.duration = "32 epochs": needs --samples-per-epoch' in told
