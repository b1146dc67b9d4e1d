"""The training program as people use it: real shards, real processes, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, RunCli
from data.making import jpeg, undecodable_jpeg, write_tar

from cmpt.train import checked_recipe

TINY = [
    "model.preset=null",
    "model.patch_size=8",
    "model.embed_dim=32",
    "model.vision={width: 32, layers: 2, heads: 2}",
    "model.text={width: 32, layers: 2, heads: 2}",
    "image.size=32",
    "engine.batch_size=32",
    "engine.precision=fp32",
    "data.streams=4",
    "data.workers=1",
    "data.heldout=[]",
    "run.duration=12 steps",
    "run.log_every=1 steps",
    "run.checkpoint_every=4 steps",
    "optimizer.warmup=2 steps",
    "evaluation.every=6 steps",
]
RECIPE = "recipes/quickstart.yaml"
TRAIN = ["python", "cmpt/train.py", RECIPE]


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"run.folder={folder}", f"run.name={name}", f"data.cache_folder={folder}/cache", *more]


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def trajectory(run: Path) -> list[tuple[int, str, float, float | None]]:
    return [(row["step"], row["batch_digest"], row["loss"], row["mask_threshold"]) for row in rows(run)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plain run of 12 steps, with an evaluation, that several tests compare with."""
    folder = tmp_path_factory.mktemp("plain")
    command = [
        sys.executable,
        *TRAIN[1:],
        *overrides(folder, "run", "data.heldout=[pkg:data/clipart/heldout-0000.tar]"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.multiprocess
def test_a_run_leaves_what_the_design_promises(uninterrupted: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "report.html", "tensorboard"):
        assert (uninterrupted / name).exists(), name
    assert {path.name for path in (uninterrupted / "pictures").iterdir()} == {"masks.png", "queries.png"}
    checkpoints = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step_00000004", "step_00000008", "step_00000012"]
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step_00000012\n"
    steps = rows(uninterrupted)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(row["samples_seen"] == 32 * row["step"] for row in steps)
    assert abs(sum(row["mask_ratio"] for row in steps) / 12 - 0.5) < 0.03
    evaluations = rows(uninterrupted, "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [6, 12]
    assert evaluations[-1]["pairs"] == 500 and evaluations[-1]["classes"] > 5


@pytest.mark.multiprocess
def test_logged_flops_and_tokens_are_those_of_the_kept_patches(uninterrupted: Path) -> None:
    """Invariant 8, recomputed here by hand for a model of these sizes from the logged token counts."""
    for row in rows(uninterrupted):
        image_tokens, text_tokens = row["image_tokens_per_sample"], row["text_tokens_per_sample"]
        assert image_tokens == pytest.approx(16 * (1 - row["mask_ratio"]))
        weights = 2 * (4 * 32 * 32 + 2 * 32 * 128)
        linear = 2 * weights * (image_tokens + 1 + text_tokens) + 2 * 192 * 32 * image_tokens + 2 * 2 * 32 * 32
        # Attention needs the sum of squares; by Jensen the mean's square is a lower bound.
        attention = 2 * 4 * 32 * ((image_tokens + 1) ** 2 + text_tokens**2)
        loss = 6 * 2 * 32 * 32
        low = 3 * (linear + attention) + loss
        assert low <= row["flops_per_sample"] <= 1.2 * low


@pytest.mark.multiprocess
def test_kill_at_a_random_step_and_resume_gives_the_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    """Invariant 3: digests, losses and thresholds are bit-identical after kill -9, wherever it struck."""
    victim_step = random.SystemRandom().randint(5, 11)
    command = [sys.executable, *TRAIN[1:], *overrides(tmp_path, "killed")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run, limit = tmp_path / "killed", time.monotonic() + 200
    while time.monotonic() < limit and process.poll() is None:
        done = (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines())
        if done >= victim_step and (run / "checkpoints" / "step_00000004").exists():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert trajectory(run) == trajectory(uninterrupted), f"killed at step {victim_step}"
    assert any(event["kind"] == "resume" for event in rows(run, "events.jsonl"))


@pytest.mark.multiprocess
def test_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    command = [sys.executable, *TRAIN[1:], *overrides(tmp_path, "stopped", "run.checkpoint_every=1000 steps")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    run, limit = tmp_path / "stopped", time.monotonic() + 200
    while time.monotonic() < limit and not ((run / "metrics.jsonl").exists() and len(rows(run)) >= 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 128 + signal.SIGTERM
    saved = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")]
    assert saved == [len(rows(run))] and saved[0] < 12
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert trajectory(run) == trajectory(uninterrupted)


@pytest.mark.multiprocess
def test_two_processes_under_deepspeed_give_the_same_digests_and_losses(
    uninterrupted: Path, tmp_path: Path, run_cli: RunCli, free_port: int
) -> None:
    """Invariant 2 through the real launcher, in parts (gradient caching); then on with one process, whole."""
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port), "cmpt/train.py", RECIPE]
    more = ["data.heldout=[pkg:data/clipart/heldout-0000.tar]", "run.stop_after=8 steps"]
    parts = "engine.micro_batch_size=6"
    done = run_cli([*launcher, *overrides(tmp_path, "two", *more, parts)], env={"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    early_end = run_cli([*TRAIN, *overrides(tmp_path, "two", *more)])
    assert early_end.returncode == 0 and len(rows(tmp_path / "two")) == 8, "stop_after is reached: nothing to do"
    alone = run_cli([*TRAIN, *overrides(tmp_path, "two", more[0], "engine.zero_stage=0")])
    assert alone.returncode == 0, alone.stderr
    for ours, reference in zip(rows(tmp_path / "two"), rows(uninterrupted), strict=True):
        assert ours["batch_digest"] == reference["batch_digest"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert (ours["mask_ratio"], ours["mask_threshold"]) == (reference["mask_ratio"], reference["mask_threshold"])
        for norm in ("grad_norm", "grad_norm_image", "grad_norm_text"):
            assert ours[norm] == pytest.approx(reference[norm], rel=1e-3)
    ours_last, reference_last = (rows(run, "evaluations.jsonl")[-1] for run in (tmp_path / "two", uninterrupted))
    assert ours_last["image_to_text_r10"] == pytest.approx(reference_last["image_to_text_r10"], abs=0.01)
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{free_port}_*")), "DeepSpeed's buffers go with the processes"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_two_one_two_processes_with_kills_are_one_run(tmp_path: Path, free_port: int) -> None:
    """Every process is killed with -9 in each part; the digests are those of one uninterrupted process."""
    sources = "data.train=[{urls: ['pkg:data/clipart/train-{0000..0003}.tar'], weight: 3}, "
    sources += "{urls: ['pkg:data/clipart/train-{0004..0007}.tar'], weight: 2}]"
    more = [sources, "run.duration=48 steps", "run.checkpoint_every=3 steps"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def begin(name: str, world_size: int) -> subprocess.Popen[bytes]:
        launcher = ["deepspeed", "--num_accelerators", str(world_size), "--master_port", str(free_port)]
        command = [*(launcher if world_size > 1 else ["python"]), "cmpt/train.py", RECIPE]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, *overrides(tmp_path, name, *more)], cwd=REPOSITORY, env=environment, **quiet)

    assert begin("whole", 1).wait(timeout=300) == 0
    run = tmp_path / "parts"
    for world_size, until in ((4, 10), (2, 20), (1, 30)):
        process = begin("parts", world_size)
        limit = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < limit:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= until:
                break
            time.sleep(0.01)
        subprocess.run(["pkill", "-9", "-f", f"run.folder={tmp_path} "], check=False)
        assert process.wait(timeout=60) != 0, "it ended before it was killed"
    assert begin("parts", 2).wait(timeout=300) == 0
    found, expected = rows(run), rows(tmp_path / "whole")
    assert [row["step"] for row in found] == list(range(1, 49))
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in expected]
    for ours, reference in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_masks_by_embeddings_with_two_processes_and_sharded_weights(
    tmp_path: Path, run_cli: RunCli, free_port: int
) -> None:
    """α from 0 to 1 within the run; the weights are gathered for it at ZeRO stage 3. Losses as with one process."""
    more = [
        "run.duration=6 steps",
        "masking={embedding_share_end: 1.0, embedding_positions: true}",
        "text_masking={strategy: frequency, tokens: 6, frequencies: pkg:data/clipart/word_counts.json}",
    ]
    launcher = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port), *TRAIN[1:]]
    both = run_cli([*launcher, *overrides(tmp_path, "two", *more, "engine.zero_stage=3")])
    assert both.returncode == 0, both.stderr
    alone = run_cli([*TRAIN, *overrides(tmp_path, "one", *more)])
    assert alone.returncode == 0, alone.stderr
    for ours, reference in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["batch_digest"] == reference["batch_digest"]
        assert ours["text_tokens_per_sample"] == reference["text_tokens_per_sample"] <= 6
        # Weights differ in the last bits, so a patch at the threshold may fall to either side.
        assert ours["mask_ratio"] == pytest.approx(reference["mask_ratio"], abs=2e-3)
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-3)
    assert len({row["mask_threshold"] for row in rows(tmp_path / "one")}) >= 4


def two_processes_after(steps: int, overrides: list[str], run: Path, port: int) -> subprocess.Popen[str]:
    """DeepSpeed's launcher in the background, in a session of its own, once so many steps have been logged."""
    folder = Path(sys.executable).parent
    launcher = [str(folder / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [*launcher, "cmpt/train.py", RECIPE, *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{folder}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 200
    while time.monotonic() < limit and not ((run / "metrics.jsonl").exists() and len(rows(run)) >= steps):
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(tmp_path: Path, free_port: int) -> None:
    """A terminal sends SIGINT to every process, and the launcher then SIGTERMs its ranks once more."""
    more = ["run.duration=3000 steps", "run.checkpoint_every=100000 steps"]
    process = two_processes_after(3, overrides(tmp_path, "run", *more), tmp_path / "run", free_port)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode != 0
    run = tmp_path / "run"
    assert [int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")] == [len(rows(run))]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_holes_are_left_out_alike_by_one_and_by_two_processes(tmp_path: Path, run_cli: RunCli, free_port: int) -> None:
    """Pictures that pass every check and that the decoder then refuses keep their slot; by torchrun, in bf16."""
    captions = [json.dumps({"captions": [f"picture number {n}"]}).encode() for n in range(40)]
    images = [undecodable_jpeg(n) if n % 5 == 0 else jpeg(n) for n in range(40)]
    write_tar(tmp_path / "s.tar", [(f"s{n:04d}", {"jpg": images[n], "json": captions[n]}) for n in range(40)])
    more = [f"data.train=[{{urls: [{tmp_path}/s.tar]}}]", "run.duration=4 steps", "engine.precision=bf16"]
    alone = run_cli([*TRAIN, *overrides(tmp_path, "one", *more)])
    assert alone.returncode == 0, alone.stderr
    launcher = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port), *TRAIN[1:]]
    both = run_cli([*launcher, *overrides(tmp_path, "two", *more)])
    assert both.returncode == 0, both.stderr
    for ours, reference in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["batch_digest"] == reference["batch_digest"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=2e-2)
        assert ours["skipped_samples"] == reference["skipped_samples"] > 0
    skips = [event for event in rows(tmp_path / "two", "events.jsonl") if event["kind"] == "skip"]
    assert {event["cause"] for event in skips} == {"decode_failed"}
    assert {int(event["key"][-4:]) % 5 for event in skips} == {0}


@pytest.mark.multiprocess
def test_phases_run_one_after_the_other_and_resume_inside_one(tmp_path: Path, run_cli: RunCli) -> None:
    phases = [
        "run.duration=null",
        "phases=[{name: masked, duration: 5 steps}, {name: large, duration: 4 steps, set: {masking.strategy: none,"
        " image.size: 48, optimizer.lr: 1e-4, optimizer.warmup: 1 steps}}]",
    ]
    whole = run_cli([*TRAIN, *overrides(tmp_path, "whole", *phases)])
    assert whole.returncode == 0, whole.stderr
    for stop in ("3 steps", "7 steps"):
        part = run_cli([*TRAIN, *overrides(tmp_path, "parts", *phases, f"run.stop_after={stop}")])
        assert part.returncode == 0, part.stderr
    rest = run_cli([*TRAIN, *overrides(tmp_path, "parts", *phases)])
    assert rest.returncode == 0, rest.stderr
    assert trajectory(tmp_path / "parts") == trajectory(tmp_path / "whole")
    found = rows(tmp_path / "whole")
    assert [row["phase"] for row in found] == ["masked"] * 5 + ["large"] * 4
    assert found[-1]["image_tokens_per_sample"] == 36 and found[-1]["mask_ratio"] == 0


@pytest.mark.multiprocess
def test_bad_input_ends_the_program_with_one_clear_line(tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli([*TRAIN, *overrides(tmp_path, "bad", "masking.stratgy=random")])
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "masking.strategy" in error and "Traceback" not in done.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("more", "environment", "expected"),
    [
        (["engine.batch_size=many"], {}, "engine.batch_size"),
        (["data.train.0.urls=['/nowhere/{0..3}.tar']"], {}, "/nowhere/0.tar"),
        (["data.train.0.urls=['/nowhere/*.tar']"], {}, "matches no file"),
        (["data.train.0.urls=['pipe:cat x.tar']"], {}, "data.allow_pipe=true"),
        (["data.train.0.weight=0"], {}, "data.train.0.weight"),
        (["engine.batch_size=30"], {}, "data.streams"),
        ([], {"WORLD_SIZE": "3", "RANK": "0"}, "data.streams"),
        (["tokenizer.path=/nowhere/tokenizer.model"], {}, "/nowhere/tokenizer.model"),
        (["image.size=36"], {}, "image.size"),
    ],
)
def test_bad_input_is_found_before_any_work(
    more: list[str],
    environment: dict[str, str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        checked_recipe([RECIPE, *overrides(tmp_path, "bad", *more)])
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and expected in error
    assert not (tmp_path / "bad").exists()


@pytest.mark.multiprocess
def test_an_existing_run_with_another_recipe_is_not_touched(uninterrupted: Path, run_cli: RunCli) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run_cli([*TRAIN, *overrides(uninterrupted.parent, "run", "masking.strategy=random")])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "masking.strategy" in errors[0] and "run.overwrite=true" in errors[0]
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def damaged_shard(path: Path, good: int) -> None:
    """`good` usable pairs and one of each: broken JPEG, empty caption, missing image."""

    def pair(number: int, image: bytes | None, caption: str) -> tuple[str, dict[str, bytes]]:
        members = {"json": json.dumps({"captions": [caption], "category": "x"}).encode()}
        return f"s{number:04d}", members if image is None else {"jpg": image, **members}

    samples = [pair(n, jpeg(n), f"picture number {n}") for n in range(good)]
    samples += [
        pair(good, jpeg(good)[:200], "a broken picture"),
        pair(good + 1, jpeg(good + 1), "  "),
        pair(good + 2, None, "no picture"),
    ]
    write_tar(path, samples)


@pytest.mark.multiprocess
def test_unusable_samples_are_replaced_counted_and_named(tmp_path: Path, run_cli: RunCli) -> None:
    damaged_shard(tmp_path / "s.tar", good=61)
    more = [f"data.train=[{{urls: [{tmp_path}/s.tar]}}]", "run.duration=1 epochs", "run.checkpoint_every=100 steps"]
    done = run_cli([*TRAIN, *overrides(tmp_path, "dirty", *more)])
    assert done.returncode == 0, done.stderr
    skips = [event for event in rows(tmp_path / "dirty", "events.jsonl") if event["kind"] == "skip"]
    once = {(event["cause"], event["key"].split("/")[-1]) for event in skips}
    assert {key for _, key in once} == {"s0061", "s0062", "s0063"}
    assert len({cause for cause, _ in once}) == 3
    assert rows(tmp_path / "dirty")[-1]["skipped_samples"] == len(skips)
    for row in rows(tmp_path / "dirty"):  # what was in a step can be had again without running anything
        ledger = [sys.executable, "-m", "cmpt.data.streams", RECIPE, *overrides(tmp_path, "dirty", *more)]
        listed = run_cli([*ledger, "--step", str(row["step"])])
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.splitlines()[-1] == f"batch_digest {row['batch_digest']}, as the run logged it"
        assert len(listed.stdout.splitlines()) == 1 + 32 + 1


@pytest.mark.multiprocess
def test_a_set_in_which_everything_is_rejected_stops_and_says_so(tmp_path: Path, run_cli: RunCli) -> None:
    damaged_shard(tmp_path / "s.tar", good=0)
    more = [f"data.train=[{{urls: [{tmp_path}/s.tar]}}]", "data.streams=1"]
    done = run_cli([*TRAIN, *overrides(tmp_path, "hopeless", *more)])
    assert done.returncode == 2
    assert "cannot be used" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multiprocess
def test_help_says_how_to_use_it(run_cli: RunCli) -> None:
    done = run_cli(["python", "cmpt/train.py", "--help"])
    assert done.returncode == 0 and "recipes/quickstart.yaml" in done.stdout


def process_of_rank(rank: int, folder: Path) -> int:
    """The pid of the process that trains as this rank of the run in `folder`."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = {*(entry / "cmdline").read_bytes().split(b"\0"), *(entry / "environ").read_bytes().split(b"\0")}
                if {b"cmpt/train.py", f"run.folder={folder}".encode(), f"RANK={rank}".encode()} <= words:
                    return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.multiprocess
def test_a_stopped_process_is_named_with_its_stack_and_the_run_ends(tmp_path: Path, free_port: int) -> None:
    more = ["run.duration=100000 steps", "run.log_every=1 steps", "guard.watchdog_seconds=8"]
    run = tmp_path / "run"
    process = two_processes_after(5, overrides(tmp_path, "run", *more), run, free_port)
    os.kill(process_of_rank(1, tmp_path), signal.SIGSTOP)
    stopped = time.monotonic()
    _, told = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - stopped < 60
    (stall,) = [event for event in rows(run, "events.jsonl") if event["kind"] == "stall"]
    assert stall["rank"] == 1 and stall["state"] == "stopped by a signal" and 8 <= stall["seconds"] < 30
    assert any("cmpt/train.py" in line and "in train" in line for line in stall["stack"])
    assert "rank 1 on host" in told and "has stood still" in told
