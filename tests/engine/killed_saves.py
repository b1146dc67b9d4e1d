"""Run by test_kill.py: a run that saves all the time onto a slow disk is killed again and again.

    python tests/engine/killed_saves.py FOLDER KILLS KILLS_OF_TWO_RANKS SEED

This process imports everything once and forks the ranks of each start. A start loads the newest checkpoint, compares
what it got with the uninterrupted run at that step, bit by bit, and trains on, until kill -9 at a random moment. With
several ranks one of them is killed alone. Prints a JSON object by world size: in which phases of a save the kills
struck.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict
from multiprocessing import RawArray
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (what DeepSpeed imports late costs a child seconds)
import safetensors.torch
import torch
import torch._dynamo
from small import BATCH, IMAGE_SIZE, MODEL, own_rows, rows_of  # beside this script

from cmpt.dist import process_group
from cmpt.dist.process_group import sum_over_ranks
from cmpt.engine import parts, sharded, store
from cmpt.engine.build import Trained, build
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.manifest import newest_sound
from cmpt.engine.step import find_gradient, take_step
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

STEPS, PAUSE_S, LIFE_S = 80, 0.008, 0.7
PHASES = (
    "nothing is written",
    "a part is half written",
    "the parts are written, no manifest",
    "the manifest is written, not renamed",
    "renamed, not yet the latest",
    "the latest, not yet copied",
    "a copy is half written",
    "a copy is written, not renamed",
    "an old one is half deleted",
)
(IDLE, PART, NO_MANIFEST, NOT_RENAMED, NOT_LATEST, LATEST, COPYING, COPIED, DELETING) = range(len(PHASES))
PUBLISHED, RESUMED = 0, 1  # places in `told`, before one phase for each rank


def slow_disk(told: Any, rank: int) -> None:
    """Every write, sync, rename and deletion of this process takes longer, and `told` has what goes on."""
    fsync, copy, rmtree = os.fsync, shutil.copy, shutil.rmtree
    replace, write_manifest, publish, prune = (
        store._replace,
        store.write_manifest,
        store.Store.publish,
        store.Store.prune,
    )

    def phase(number: int) -> None:
        told[2 + rank] = number
        time.sleep(PAUSE_S)

    def slow_fsync(descriptor: int) -> None:
        time.sleep(PAUSE_S / 4)
        fsync(descriptor)

    def slow_save_file(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        content = safetensors.torch.save(tensors, metadata)
        with open(path, "wb", buffering=0) as file:
            for quarter in range(4):
                file.write(content[quarter * len(content) // 4 : (quarter + 1) * len(content) // 4])
                phase(PART)
        phase(NO_MANIFEST)

    def slow_manifest(*arguments: Any) -> None:
        phase(NO_MANIFEST)
        write_manifest(*arguments)
        phase(NOT_RENAMED)

    def slow_replace(beside: Path, final: Path) -> None:
        first = final.parent.name == "first"
        phase(NOT_RENAMED if first else COPIED)
        replace(beside, final)
        phase(NOT_LATEST if first else DELETING)

    def told_publish(own: store.Store, step: int, files: Any) -> Path:
        path = publish(own, step, files)
        told[PUBLISHED] = step
        phase(LATEST)
        return path

    def slow_copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        phase(COPYING)
        copy(source, target)

    def slow_rmtree(path: Path, ignore_errors: bool = False) -> None:
        for member in list(Path(path).glob("*"))[:2]:
            member.unlink()
            phase(DELETING)
        rmtree(path, ignore_errors)

    def told_prune(own: store.Store) -> None:
        prune(own)
        phase(IDLE)

    os.fsync, parts.save_file, shutil.copy, shutil.rmtree = slow_fsync, slow_save_file, slow_copy, slow_rmtree
    store.write_manifest, store._replace = slow_manifest, slow_replace
    store.Store.publish, store.Store.prune = told_publish, told_prune  # type: ignore[method-assign]


def digest(trained: Trained, state: TrainState) -> str:
    """Of every bit that a resume must bring back on this rank: weights, moments, average, state."""
    kept = sharded.kept_tensors(trained.engine, trained.average)
    small = [asdict(state), asdict(trained.loss_scale), sharded.optimizer_steps(trained.engine), sorted(kept)]
    found = hashlib.sha256(json.dumps(small).encode())
    for piece in sharded.pieces(trained.engine):
        for kind in sorted(kept):
            found.update(piece.of(kept[kind]).contiguous().numpy().tobytes())
    return found.hexdigest()


def put_first_weights(trained: Trained) -> None:
    """Those of seed 0, without moments."""
    first = {name: p.detach().flatten() for name, p in CLIP(MODEL, IMAGE_SIZE, seed=0).named_parameters()}

    def read(kind: str, piece: sharded.Piece) -> torch.Tensor:
        value = first[piece.name][piece.start : piece.start + piece.numel]
        return torch.zeros_like(value) if kind in sharded.MOMENTS else value

    sharded.fill(trained.engine, trained.average, 0, read)


def run(folder: Path, rank: int, world: int, seed: int, told: Any, expected: list[str]) -> list[str]:
    """One rank of one start, to the last step or until it is killed. Without `expected`, nothing is saved; returns the
    digest after every step."""
    process_group.start()
    settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=2)
    clip = CLIP(MODEL, IMAGE_SIZE, seed)  # another one for every start: what a resume brings was not there before
    trained = build(clip, settings, Optimizer(ema_decay=0.9), world, torch.device("cpu"))
    checkpoints = Checkpoints(store.Store(folder / "first", keep=2, copies=folder / "second"))
    state = checkpoints.load_newest(trained) if expected else None
    if state is None:
        state = TrainState(recipe="1")
        put_first_weights(trained)
    elif digest(trained, state) != expected[state.step - 1]:
        raise AssertionError(f"rank {rank}: what was resumed at step {state.step} is not the uninterrupted run's")
    if expected:
        slow_disk(told, rank)
    told[RESUMED], told[2 + rank] = state.step, IDLE
    digests = []
    while state.step < STEPS:
        written, failed = sum_over_ranks(torch.tensor(checkpoints.progress(), dtype=torch.int64)).tolist()
        checkpoints.settle(written, failed)
        patches, text, _ = rows_of(own_rows(rank, world), [], state.step)
        result = find_gradient(trained, patches, text, None, Loss())
        take_step(trained, result, 1e-3, 1.0)
        state.advance({"threshold": result.loss}, [])
        state.loader = {"samples": state.step * BATCH}
        if expected:
            time.sleep(PAUSE_S)
            checkpoints.save(trained, state)
        else:
            digests.append(digest(trained, state))
    checkpoints.finish()
    process_group.stop()
    return digests


class Runs:
    """Starts of a run of `world` ranks in `folder`, and their ends."""

    def __init__(self, folder: Path, world: int, chance: random.Random) -> None:
        self.folder, self.world, self.chance = folder, world, chance
        self.told = RawArray("q", 2 + world)
        self.expected: list[list[str]] = [[] for _ in range(world)]
        folder.mkdir()

    def start(self, seed: int) -> list[int]:
        """The process ids of the ranks."""
        port = unused_port()
        return [self._fork(rank, port, seed) for rank in range(self.world)]

    def uninterrupted(self) -> None:
        """Fill `expected`: the digests after every step, by rank."""
        codes = [await_end(child, 300) for child in self.start(0)]
        assert not any(codes), self.faults()
        self.expected = [json.loads((self.folder / f"digests_{r}.json").read_text()) for r in range(self.world)]

    def start_and_kill(self) -> bool:
        """Kill one rank of a start at a random moment; False if it had come to its end."""
        self.told[RESUMED] = -1
        children, victim = self.start(self.chance.randrange(2, 1000)), self.chance.randrange(self.world)
        limit = time.monotonic() + 120
        while self.told[RESUMED] < 0 and not self.faults() and time.monotonic() < limit:
            time.sleep(0.002)
        assert self.told[RESUMED] >= 0, self.faults() or "no start within 120 s"
        time.sleep(self.chance.uniform(0, LIFE_S))
        assert not self.faults(), self.faults()
        os.kill(children[victim], signal.SIGKILL)
        codes = [await_end(child, 20) for child in children]
        faults = self.faults()  # of the others: the connection broke
        assert codes[victim] in (0, -signal.SIGKILL) and "is not the uninterrupted run's" not in faults, faults
        for path in self.folder.glob("fault_*.txt"):
            path.unlink()
        return codes[victim] != 0

    def faults(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("fault_*.txt")))

    def _fork(self, rank: int, port: int, seed: int) -> int:
        """A child with the environment that a launcher gives; its process id."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            if self.world > 1:
                launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in launcher.items()}, MASTER_ADDR="127.0.0.1")
            digests = run(self.folder, rank, self.world, seed, self.told, self.expected[rank])
            (self.folder / f"digests_{rank}.json").write_text(json.dumps(digests))
            code = 0
        except Exception:
            (self.folder / f"fault_{rank}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def await_end(child: int, limit_s: float) -> int:
    """The exit code of a child; it is killed if it takes longer."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_often(runs: Runs, kills: int) -> dict[str, Any]:
    """Kill so many starts during a save; those that are killed between saves do not count."""
    folder, told = runs.folder, runs.told
    first, second = folder / "first", folder / "second"
    runs.uninterrupted()
    found: Counter[str] = Counter()
    resumed, ended, began = [], 0, time.monotonic()
    while found.total() - found[PHASES[IDLE]] < kills:
        if not runs.start_and_kill():
            shutil.rmtree(first)
            shutil.rmtree(second)
            told[PUBLISHED], ended = 0, ended + 1
            continue
        found[PHASES[max(told[2:])]] += 1
        resumed.append(told[RESUMED])
        newest, passed_over = newest_sound(first, second)
        assert not passed_over, f"half a checkpoint under the name of a whole one: {passed_over}"
        step = int(newest.name[5:]) if newest else 0
        assert step >= told[PUBLISHED], f"step {told[PUBLISHED]} was complete, now the newest is {newest}"
    seconds = round(time.monotonic() - began, 1)
    return {"phases": dict(found), "resumed": resumed, "came_to_its_end": ended, "seconds": seconds}


def main() -> None:
    folder, (alone, together, seed) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    chance = random.Random(seed)
    found = {world: kill_often(Runs(folder / str(world), world, chance), n) for world, n in ((1, alone), (2, together))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
