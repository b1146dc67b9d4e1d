from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpus
from cmpt.engine.traffic import expected_bytes, parameter_sizes
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops, training_flops
from cmpt.recipe import check_recipe
from plan import main, parser, planned
from plan_fit import Measured, read_fit
from plan_run import Job, nearest_counts
from plan_tables import MemoryTable, as_json, duration, number, tables
from plan_warnings import warnings
from scaling_fit import NO_LINK, Fit, Sample
from scaling_report import Report
from scaling_text import write_json
from step_model import COMMUNICATION, TERMS, Link, Work

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
    devices = {
        "h200": "NVIDIA H200", "h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB", "l40s": "NVIDIA L40S",
        "b200": "NVIDIA B200", "a100-40": "NVIDIA A100-PCIE-40GB",
    }  # fmt: skip
    assert devices.keys() == gpus.GPUS.keys()
    for name, device in devices.items():
        assert gpus.find_gpu(name).peak_bf16_flops == peak_flops(device)
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("NVIDIA H100 NVL") is peak_flops("AMD EPYC") is None


def test_an_offloaded_optimizer_is_as_fast_as_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """Per element: 8 bytes over PCIe, and 28 of host memory that the GPUs of the node share."""
    on_gpu, on_host = job(), job("engine.offload_optimizer=true", "--host-memory-gb-per-s=200")
    elements = on_host.elements / 8
    expected = elements * (8 / 64e9 + 28 / (200e9 / 4))
    assert on_host.phase_plans[0].terms["optimizer"] == pytest.approx(expected)
    assert on_gpu.phase_plans[0].terms["optimizer"] == pytest.approx(elements * 28 / 3.35e12)
    third = job("engine.offload_optimizer=true", "engine.zero_stage=3", "--host-memory-gb-per-s=200")
    assert third.phase_plans[0].terms["optimizer"] == pytest.approx(expected + elements * 8 / 64e9)
    main([*SMALL, "engine.offload_optimizer=true"])
    told = capsys.readouterr().out
    assert "on the host: stepped elements x (8 bytes / PCIe's 64 GB/s" in told
    assert (
        "28 bytes (a fused AdamW) / a GPU's share of 300 GB/s of host memory (assumed; --host-memory-gb-per-s)" in told
    )


def test_fp32_has_no_tensor_cores() -> None:
    """Logits are fp32 in every precision."""
    bf16, fp32 = job(), job("engine.precision=fp32")
    assert fp32.phase_plans[0].terms["loss"] == bf16.phase_plans[0].terms["loss"]
    assert bf16.machine.loss_flops_per_s == fp32.machine.flops_per_s == pytest.approx(67e12 * bf16.cluster.mfu)
    times = fp32.phase_plans[0].terms["compute"] / bf16.phase_plans[0].terms["compute"]
    assert times == pytest.approx(989 / 67)
    assert "67 TFLOP/s at most, where bf16 has 989; the MFU is one of bf16" in said("engine.precision=fp32")
    assert "; the MFU is one" not in said("engine.precision=fp32", "--mfu=0.5") and "tensor cores" not in said()


def test_links_of_another_device_are_warned_of(tmp_path: Path) -> None:
    for device in ("AMD EPYC", "NVIDIA H100 PCIe"):
        fit = fit_file(tmp_path / "fit.json", device=device)
        assert f"--fit was measured on {device}, not on this h100" in said(fit)
    given = ("--mfu=0.3", "--nvlink-gb-per-s=400", "--network-gbit-per-node=3200")
    assert "--fit was measured" not in said(fit, *given), "nothing is taken from it but latencies"
    with pytest.raises(ValueError, match="its MFU is a share of the bf16 peak"):
        job(fit, "engine.precision=fp32")
    assert job(fit, "engine.precision=fp32", "--mfu=0.3").machine.flops_per_s == 0.3 * 67e12
    assert "--fit was measured" not in said(fit_file(tmp_path / "fit.json")) + said()


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
    assert "12 GPUs do not divide data.streams = 16; the nearest that do: 2 nodes or 4 nodes; else take" in told
    assert "another engine.batch_size too, for 12 GPUs do not divide 128 either" in told
    assert "do not divide" not in said()
    assert nearest_counts(16, 12, 4) == [8, 16]
    told = said("--nodes=2", "--gpus-per-node=16")
    assert "the nearest that do: 1 node; else take a data.streams that is a multiple of 32 and divides" in told


@pytest.mark.parametrize("world", range(1, 18))
def test_a_plan_and_a_run_agree_on_which_numbers_of_gpus_divide_the_streams(world: int) -> None:
    plan = job(f"--gpus-per-node={world}", "--nodes=1")
    assert plan.divides == (not check_recipe(plan.recipe, world))


def test_a_batch_that_does_not_divide_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--nodes=3"]) == 1
    told = capsys.readouterr().out
    assert told.count("data.streams = 16") == 1 and "the run would not start: 12 GPUs" in told


def test_warns_of_few_shards() -> None:
    assert "fewer shards (8) than data.streams = 16" in said()
    assert "fewer shards (8) than GPUs (16)" in said("--nodes=4")
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
    told = said("engine.zero_stage=3", "engine.micro_batch_size=4")
    assert "stage 3 buys nothing: stage 1 fits too" in told and "collectives a step, not 10" in told
    assert "stage 3 is not needed for memory: stage 1 fits too" in said("engine.zero_stage=3")
    assert "stage 3" not in said("engine.zero_stage=2")


def test_a_bucket_is_no_larger_than_the_model() -> None:
    whole, part = job(), job("engine.bucket_elements=1000000")
    assert whole.elements <= whole.zero["reduce_bucket_size"] <= whole.elements + 1 < 500_000_000
    assert part.zero["reduce_bucket_size"] == part.zero["allgather_bucket_size"] == 1_000_000


def test_warns_of_slow_reading_from_what_is_assumed_too() -> None:
    told = said("--mfu=1")
    assert "reading is too slow" in told and "storage gives 2 (assumed; --storage-gb-per-s)" in told
    assert "50 kB per image (assumed; --image-kb)" in told
    told = said("--storage-gb-per-s=0.001", "--image-kb=40")
    assert "storage gives 0.001 (given with --storage-gb-per-s)" in told and "40 kB per image (given with" in told
    assert "reading is too slow" not in said("--storage-gb-per-s=1000")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["decode.backend=cpu"], "on the CPU; decode.backend=dali decodes on the GPU"),
        (["decode.backend=cpu"], "data.workers = 2 uses no more than 2 of them, and how many there are is not known"),
        (["decode.backend=auto"], "on nodes without NVIDIA DALI, where decode.backend=auto decodes on the CPU"),
        (["decode.backend=cpu", "--cores-per-gpu=8"], "data.workers = 2 uses no more than 2 of them"),
        (["decode.backend=cpu", "data.workers=4000", "--cores-per-gpu=8"], "8 are there (--cores-per-gpu)"),
        (["decode.backend=cpu", "data.workers=4000"], None),
        (["decode.backend=cpu", "data.workers=4000", "--cores-per-gpu=4000"], None),
        (["decode.backend=cpu", "--images-per-core=1e9"], None),
        (["decode.backend=dali", "--cores-per-gpu=1"], None),
    ],
)
def test_warns_of_slow_decoding_where_the_cpu_decodes(given: list[str], told: str | None) -> None:
    found = said(*given)
    assert "the loader is too slow" not in found if told is None else told in found


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
        (["--mfu=nan"], "--mfu nan: must be above 0 and at most 1"),
        (["--reserve-gib=-1"], "--reserve-gib -1: must be 0 or more, and finite"),
        (["--reserve-gib=nan"], "--reserve-gib nan: must be 0 or more, and finite"),
        (["--reserve-gib=inf"], "--reserve-gib inf: must be 0 or more, and finite"),
        *(
            ([f"--{name}={value}"], f"--{name} {value}: must be above 0 and finite")
            for name in (
                "network-gbit-per-node",
                "nvlink-gb-per-s",
                "memory-gib",
                "price-per-gpu-hour",
                "image-kb",
                "images-per-core",
                "cores-per-gpu",
                "storage-gb-per-s",
            )
            for value in ("nan", "inf")
        ),
        (["--nodes=1000000000"], "must be at most engine.batch_size = 128 GPUs"),
        (["--fit=nowhere.json"], "--fit nowhere.json: No such file or directory"),
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


@pytest.mark.parametrize("content", [b"\x7fELF\xd0\xff", b"run:\n  name: a\x00b\n"])
def test_a_binary_file_is_no_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    told = refused(capsys, str(tmp_path / "r.yaml"), "--gpu=h100")
    assert "r.yaml" in told and len(told.splitlines()) == 1


def test_epochs_need_the_number_of_samples(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "recipes/vitb16_cc12m.yaml", "--gpu=h100")
    assert 'run.duration = "32 epochs": needs --samples-per-epoch' in told


def test_layers_with_rates_of_their_own_have_groups_of_their_own() -> None:
    plan = job("optimizer.vision_layer_decay=0.9")
    assert plan.sizes == parameter_sizes(CLIP(plan.recipe.model, plan.recipe.image.size), True)
    assert len(plan.sizes) > len(job().sizes) and plan.calls(1)["parameters"] == len(plan.sizes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_most_pairs_at_once_fit_and_the_next_more_do_not(stage: int) -> None:
    plan = job("model.preset=ViT-S-16", "engine.batch_size=752", f"engine.zero_stage={stage}")
    least, most = (plan.memory(stage, micro).bytes for micro in (1, 47))
    for share in (0.1, 0.4, 0.6, 0.9):
        plan.cluster = replace(plan.cluster, memory_bytes=least + share * (most - least))
        found = plan.most_at_once(stage)
        assert found is not None and plan.fits(plan.memory(stage, found))
        parts = -(-plan.pairs // found)
        assert found == -(-plan.pairs // parts), "one part of equal ones, as a step makes them"
        if parts > 1:
            more = -(-plan.pairs // (parts - 1)) if parts > 2 else None
            assert not plan.fits(plan.memory(stage, more))
    plan.cluster = replace(plan.cluster, memory_bytes=least / 2)
    assert plan.most_at_once(stage) is None


def test_small_figures_keep_three_digits() -> None:
    assert [duration(s) for s in (0, 2.5e-7, 4.87e-6, 0.0941, 1.5, 100, 150, 7200)] == [
        "0", "0.250 µs", "4.87 µs", "94.1 ms", "1.50 s", "100 s", "2.50 min", "2.00 h",
    ]  # fmt: skip
    assert [number(x, 1) for x in (0, 0.00123, 3.14159, 31.4159, 31415.9)] == [
        "0",
        "0.00123",
        "3.14",
        "31.4",
        "31,415.9",
    ]


def test_no_time_that_is_not_zero_is_printed_as_zero() -> None:
    plan = job()
    table = next(table for table in tables(plan, MemoryTable.of(plan)) if table.title.startswith("Time"))
    shown = {row[0]: row[1] for row in table.rows}
    for term, seconds in plan.phase_plans[0].terms.items():
        assert (shown[term] == "0") == (seconds == 0)
    assert shown["hours"] != "0" and shown["GPU hours"] != "0"


def fit_file(path: Path, **changes: Any) -> str:
    """Of a study, as tools/scaling.py writes it; the keys that a plan reads, and one that it does not."""
    told = {
        "points": 6,
        "device": "NVIDIA H100 80GB HBM3",
        "mfu": 0.4,
        "fit": {
            "inside": {"latency_s": 2e-5, "bytes_per_s": 3e11},
            "between": {"latency_s": 4e-5, "bytes_per_s": 1e11},
            "fixed_s": 0.01,
        },
    }
    path.write_text(json.dumps({**told, **changes}))
    return f"--fit={path}"


def test_a_study_gives_mfu_and_links_and_options_win(tmp_path: Path) -> None:
    fit = fit_file(tmp_path / "fit.json")
    plan = job(fit)
    assert plan.cluster.mfu == 0.4 and plan.machine.flops_per_s == pytest.approx(0.4 * plan.cluster.gpu.peak_bf16_flops)
    assert (plan.machine.inside.bytes_per_s, plan.machine.between.latency_s) == (3e11, 4e-5)
    shown = "\n".join(table.text() for table in tables(plan, MemoryTable.of(plan)))
    assert f"measured on NVIDIA H100 80GB HBM3, {tmp_path}" in shown
    assert f"800 Gbit/s per node (measured on NVIDIA H100 80GB HBM3, {tmp_path}" in shown and "assumed)." not in shown
    given = job(fit, "--mfu=0.3", "--network-gbit-per-node=1600", "--nvlink-gb-per-s=100")
    assert (given.cluster.mfu, given.cluster.mfu_source) == (0.3, "given with --mfu")
    assert (given.machine.inside.bytes_per_s, given.machine.between.bytes_per_s) == (1e11, 2e11)
    assert given.machine.between.latency_s == 4e-5, "no option gives it"


def test_what_a_study_did_not_measure_stays_as_it_is_without(tmp_path: Path) -> None:
    unknown = {"latency_s": 0.0, "bytes_per_s": None}
    links = {"inside": {"latency_s": 2e-5, "bytes_per_s": 3e11}, "between": unknown}
    plan, public = job(fit_file(tmp_path / "fit.json", mfu=None, fit=links)), job()
    assert (plan.cluster.mfu, plan.cluster.between) == (public.cluster.mfu, public.cluster.between)
    assert plan.machine.inside.bytes_per_s == 3e11


def test_what_a_study_writes_can_be_read(tmp_path: Path) -> None:
    fitted = Fit({8: 5e-15}, 0, {}, 0, 0, 1e-11, Link(2e-5, 3e11), NO_LINK, {}, 0, None)
    terms = {**dict.fromkeys(TERMS, 0.0), "compute": 0.1}
    record = {"device": "NVIDIA H100 80GB HBM3"}
    sample = Sample("weak", record, 1, Work(8, 8, 256, 2e13, 0, 1, {}, {}), terms, 0.1)
    report = Report(None, [], [sample], fitted, {}, {}, {}, [], {}, 0)  # type: ignore[arg-type]
    write_json(report, tmp_path / "fit.json")
    measured = read_fit(str(tmp_path / "fit.json"))
    assert measured.mfu == pytest.approx(2e13 / 0.1 / peak_flops(record["device"]))
    assert measured == Measured(record["device"], report.mfu, Link(2e-5, 3e11), None)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "is not the fit.json of a study"),
        ('{"points": 2}', "is not the fit.json of a study"),
        ('{"points": 0, "failed": 2}', "no point of this study was measured"),
        (
            '{"points": 1, "device": "a CPU", "mfu": null, "fit": {"inside": {"latency_s": 0.0, "bytes_per_s": null}, '
            '"between": {"latency_s": 0.0, "bytes_per_s": null}}}',
            "has neither an MFU nor a link",
        ),
    ],
)
def test_what_is_no_fit_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / "fit.json").write_text(content)
    assert told in refused(capsys, *SMALL, f"--fit={tmp_path / 'fit.json'}")


def test_several_nodes_of_a_card_without_a_usual_network_need_one(tmp_path: Path) -> None:
    assert job("--gpu=l40s", "--network-gbit-per-node=100").machine.between.bytes_per_s == 100e9 / 8
    assert job("--gpu=l40s", fit_file(tmp_path / "fit.json")).machine.between.bytes_per_s == 1e11
