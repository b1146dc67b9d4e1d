"""What a run does about bad batches, unequal weights and too little memory: real runs, with faults put into them."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli
from test_train import RECIPE, overrides, rows, trajectory

SCRIPT = "tests/guarded_train.py"
SMALL_WINDOW = "guard.window=8"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(run_cli: RunCli, free_port: int, tmp_path: Path) -> Run:
    """`train(faults, name, "key=value", …, world=1)`: the run `name`, with faults (tests/guarded_train.py)."""

    def start(faults: dict[str, Any], name: str, *more: str, world: int = 1) -> subprocess.CompletedProcess[str]:
        launcher = ["python"]
        if world > 1:
            launcher = ["torchrun", "--nproc-per-node", str(world), "--master-port", str(free_port)]
        return run_cli([*launcher, SCRIPT, json.dumps(faults), RECIPE, *overrides(tmp_path, name, *more)])

    return start


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in rows(run, "events.jsonl") if event["kind"] == kind]


def digest_of(keys: list[str]) -> str:
    """The digest of a global batch of four streams, from the names of its samples."""
    share = len(keys) // 4
    streams = [
        hashlib.blake2b("\0".join(f"0/{key}" for key in keys[n * share :][:share]).encode(), digest_size=16).digest()
        for n in range(4)
    ]
    return hashlib.blake2b(b"".join(streams), digest_size=16).hexdigest()


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why the run ended; nothing else of cmpt's own."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "train.py" not in done.stderr.split("error: ")[0], done.stderr
    return errors[0]


def ended_as_a_users_error(done: subprocess.CompletedProcess[str], world: int) -> bool:
    """Exit code 2; torchrun itself exits with 1 and reports the 2."""
    return done.returncode == 2 if world == 1 else done.returncode == 1 and "exitcode  : 2" in done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("world", "stage"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_bad_batch_is_named_and_left_out(world: int, stage: int, train: Run, tmp_path: Path) -> None:
    """One NaN on one rank at step 6. By digest and by the keys of all its samples, and the run goes on without it."""
    done = train({"nan": [6]}, "run", f"engine.zero_stage={stage}", world=world)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    (event,) = events(run, "refused")
    listed = Path(event["keys"])
    named = {key: event[key] for key in ("step", "cause", "action", "back_to", "loss", "not_finite")}
    assert named == {
        "step": 6,
        "cause": "the loss is nan",
        "action": "skip",
        "back_to": None,
        "loss": None,
        "not_finite": {"loss": "nan", "grad_norm": "nan"},
    }
    keys = listed.read_text().splitlines()
    assert listed == run / "refused/step_00000006.txt" and len(set(keys)) == 32
    steps = rows(run)
    assert event["batch_digest"] == steps[5]["batch_digest"] == digest_of(keys)
    assert [row["refused_batches"] for row in steps] == [0] * 5 + [1] * 7
    # The weights of step 7 are those of step 6: the temperature tells, which no batch decides.
    assert steps[6]["logit_scale"] == steps[5]["logit_scale"] != steps[7]["logit_scale"]
    assert all(row["loss"] < 5 for row in steps if row["step"] != 6)
    warning = f"step 6: warning: the loss is nan; batch {event['batch_digest']} was left out, its samples are listed in"
    assert f"{warning} {listed}" in done.stdout


@pytest.mark.multiprocess
def test_a_rewind_goes_on_from_the_checkpoint_with_the_next_batch(train: Run, tmp_path: Path) -> None:
    """With the checkpoint of step 4 and NaN in step 6, step 7 is as if batches 5 and 6 had both been left out."""
    rewound = train({"nan": [6]}, "rewound", "guard.action=rewind")
    assert rewound.returncode == 0, rewound.stderr
    assert train({"nan": [5, 6]}, "skipped").returncode == 0
    (event,) = events(tmp_path / "rewound", "refused")
    assert event["action"] == "rewind" and event["back_to"] == 4
    ours, reference = trajectory(tmp_path / "rewound"), trajectory(tmp_path / "skipped")
    assert ours[6:] == reference[6:]
    assert [step for step, *_ in ours] == list(range(1, 13)) and len({digest for _, digest, *_ in ours}) == 12
    assert "was left out" in rewound.stdout and "went on from the weights of step 4" in rewound.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rewind_without_a_checkpoint_stops_and_says_so(train: Run, tmp_path: Path) -> None:
    done = train({"nan": [3]}, "run", "guard.action=rewind")
    assert done.returncode == 2
    assert "step 3: the loss is nan, and there is no checkpoint to rewind to; batch " in error_line(done)
    (event,) = events(tmp_path / "run", "refused")
    assert event["action"] == "stop" and event["back_to"] is None


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_names_the_batch_and_a_second_start_may_skip_it(world: int, train: Run, tmp_path: Path) -> None:
    """In the step after the checkpoint began, which is whole by the end; the joined run is that which always skips."""
    stopped = train({"nan": [5]}, "run", "guard.action=stop", world=world)
    assert ended_as_a_users_error(stopped, world), stopped.stderr
    run = tmp_path / "run"
    (event,) = events(run, "refused")
    line = error_line(stopped)
    assert line.startswith("error: step 5: the loss is nan; batch ") and "guard.action=skip" in line
    assert event["batch_digest"] in line and event["keys"] in line and Path(event["keys"]).is_file()
    assert [path.name for path in (run / "checkpoints").glob("*step*")] == ["step_00000004"]
    again = train({"nan": [5]}, "run", world=world)
    assert again.returncode == 0, again.stderr
    assert train({"nan": [5]}, "skips", world=world).returncode == 0
    assert trajectory(run)[5:] == trajectory(tmp_path / "skips")[5:]
    assert [event["action"] for event in events(run, "refused")] == ["skip"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_decides_again_as_it_did(train: Run, tmp_path: Path) -> None:
    """A NaN before the checkpoint, a spike after it, kill -9 after that: the joined run is the uninterrupted one."""
    faults = {"nan": [6], "spike": [11]}
    whole = train(faults, "whole", SMALL_WINDOW)
    assert whole.returncode == 0, whole.stderr
    assert train(faults | {"kill": [11]}, "killed", SMALL_WINDOW).returncode == -signal.SIGKILL
    assert train(faults | {"kill": [11]}, "killed", SMALL_WINDOW).returncode == 0
    refusals = [events(tmp_path / name, "refused") for name in ("whole", "killed")]
    decided = [[(e["step"], e["cause"], e["batch_digest"]) for e in refused] for refused in refusals]
    assert decided[0] == decided[1] and [step for step, *_ in decided[0]] == [6, 11]
    assert "deviations above" in refusals[0][1]["cause"]
    assert rows(tmp_path / "whole")[10]["loss"] > 1.3 * rows(tmp_path / "whole")[9]["loss"], "it is a real jump"
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ruined_weights_end_the_run_at_the_limit_unless_it_rewinds(train: Run, tmp_path: Path) -> None:
    """All weights are doubled at step 10. Every batch after that looks like a spike, until other weights are there."""
    skipping = train({"ruin": [10]}, "skipping", SMALL_WINDOW, "guard.limit=1")
    assert skipping.returncode == 2
    assert "after 1 refused batches; batch " in error_line(skipping) and "guard.limit" in error_line(skipping)
    assert [event["action"] for event in events(tmp_path / "skipping", "refused")] == ["skip", "stop"]
    rewinding = train({"ruin": [10]}, "rewinding", SMALL_WINDOW, "guard.limit=1", "guard.action=rewind")
    assert rewinding.returncode == 0, rewinding.stderr
    (event,) = events(tmp_path / "rewinding", "refused")
    assert event["back_to"] == 8
    losses = [row["loss"] for row in rows(tmp_path / "rewinding")]
    assert max(losses[10:]) < 5 < losses[9]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_phase_has_an_estimate_of_its_own(train: Run, tmp_path: Path) -> None:
    phases = ["run.duration=null", "phases=[{name: a, duration: 10 steps}, {name: b, duration: 1 steps}]"]
    done = train({"spike": [11]}, "run", SMALL_WINDOW, *phases)
    assert done.returncode == 0, done.stderr
    steps = rows(tmp_path / "run")
    assert steps[10]["loss"] > 1.3 * steps[9]["loss"] and steps[10]["refused_batches"] == 0


@pytest.mark.multiprocess
@pytest.mark.parametrize(("stage", "every"), [pytest.param(0, 3, marks=pytest.mark.slow), (1, 1)])
def test_a_flipped_weight_ends_the_run_before_the_next_checkpoint(
    stage: int, every: int, train: Run, tmp_path: Path
) -> None:
    """The bit flips after step 5; stage 0 finds it whenever it looks, the others in the same step."""
    more = [f"engine.zero_stage={stage}", f"guard.weights_every={every} steps"]
    done = train({"flip": [5]}, "run", *more, world=2)
    assert ended_as_a_users_error(done, world=2), done.stderr
    host = socket.gethostname()
    found = f"rank 0 on {host}, rank 1 on {host} differ in text.transformer.blocks.1.c_fc.weight"
    assert f"step 6: the ranks have unequal weights: {found}; no step was taken" in error_line(done)
    (event,) = events(tmp_path / "run", "unequal_weights")
    assert event["step"] == 6 and event["action"] == "stop"
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("*step*")] == ["step_00000004"]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_after_a_rewind_all_ranks_have_the_same_weights_again(stage: int, train: Run, tmp_path: Path) -> None:
    """A flip of what is computed with, then one of what is stepped; compared at every step. Two rewinds, no more."""
    more = ["guard.weights_every=1 steps", "guard.unequal_weights=rewind", f"engine.zero_stage={stage}"]
    done = train({"flip": [5], "bad": [9]}, "run", *more, world=2)
    assert done.returncode == 0, done.stderr
    found = events(tmp_path / "run", "unequal_weights")
    assert [(event["step"], event["action"], event["back_to"]) for event in found] == [
        (6, "rewind", 4),
        (10, "rewind", 8),
    ]
    if stage:
        assert f"rank 1 on {socket.gethostname()} differs from its own master weights in" in found[1]["cause"]
    assert done.stdout.count("warning: the ranks have unequal weights") == 2
    assert rows(tmp_path / "run")[-1]["refused_batches"] == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_dry_run_changes_no_loss(train: Run, tmp_path: Path) -> None:
    assert train({}, "with").returncode == 0
    assert train({}, "without", "guard.dry_run=false").returncode == 0
    assert trajectory(tmp_path / "with") == trajectory(tmp_path / "without")
    assert len(events(tmp_path / "with", "dry_run")) == 1 and not events(tmp_path / "without", "dry_run")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_too_little_memory_shows_before_the_first_step_and_the_advice_helps(train: Run, tmp_path: Path) -> None:
    """The dry run may take 64 MB: not enough for 1,024 pairs at once, enough for them in parts of 32."""
    more = ["engine.batch_size=1024", "run.duration=1 steps", "data.prefetch_batches=1"]
    done = train({"memory": 64_000_000}, "whole", *more)
    assert done.returncode == 2
    line = error_line(done)
    assert "1024 images of 11 patches and captions of 32 tokens per rank, 1024 at a time" in line
    assert "Try, in this order: engine.micro_batch_size=512 (gradient caching" in line
    assert "Traceback" not in done.stderr and rows(tmp_path / "whole") == []
    parts = train({"memory": 64_000_000}, "parts", *more, "engine.micro_batch_size=32")
    assert parts.returncode == 0, parts.stderr
    assert len(events(tmp_path / "parts", "dry_run")) == 1 and len(rows(tmp_path / "parts")) == 1
