"""The matrix of test_elastic.py: a checkpoint of any world size and ZeRO stage, resumed at any other."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from small import BATCH, IMAGE_SIZE, MODEL, own_rows, rows_of  # beside this script

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist import process_group
from cmpt.engine import sharded
from cmpt.engine.build import Trained, build
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.step import find_gradient, take_step
from cmpt.engine.store import Store
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

BEFORE, AFTER = 3, 10  # steps
STAGES = (0, 1, 2, 3)


def build_at(stage: int, world: int, seed: int) -> Trained:
    # With a section of its own a single process gets the stage that is asked for, too.
    settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage, deepspeed={"zero_optimization": {}})
    trained = build(
        CLIP(MODEL, IMAGE_SIZE, seed), settings, Optimizer(ema_decay=0.8, clip_norm=1.0), world, torch.device("cpu")
    )
    assert trained.engine.zero_optimization_stage() == stage
    return trained


@cache
def rows_of_step(rank: int, world: int, step: int) -> tuple[PackedPatches, PackedText]:
    patches, text, _ = rows_of(own_rows(rank, world), [], step)
    return patches, text


def train(trained: Trained, state: TrainState, steps: int, rank: int, world: int) -> list[float]:
    losses = []
    for step in range(state.step, state.step + steps):
        patches, text = rows_of_step(rank, world, step)
        result = find_gradient(trained, patches, text, None, Loss(chunk_rows=3))
        take_step(trained, result, 1e-3, 1.0)
        state.advance({}, [])
        losses.append(result.loss)
    return losses


def average_norm(trained: Trained) -> float:
    """Of the average of the weights on all ranks: it has no part in the loss, and must go on as well."""
    assert trained.average is not None
    own = [piece.of(trained.average.flats) for piece in sharded.own_pieces(trained.engine)]
    square = sum((values.double().pow(2).sum() for values in own), torch.zeros((), dtype=torch.float64))
    return float(process_group.sum_over_ranks(square)) ** 0.5


def save(folder: Path, rank: int, world: int) -> None:
    for stage in STAGES:
        trained, state = build_at(stage, world, seed=0), TrainState()
        train(trained, state, BEFORE, rank, world)
        checkpoints = Checkpoints(Store(folder / f"{world}-{stage}", keep=1))
        checkpoints.save(trained, state)
        checkpoints.finish()
        found = [*train(trained, state, AFTER, rank, world), average_norm(trained)]
        if rank == 0:
            (folder / f"{world}-{stage}.json").write_text(json.dumps(found))


def resume(folder: Path, rank: int, world: int, saved_worlds: list[int], covering: bool) -> dict[str, float]:
    apart = {}
    for saved_world in saved_worlds:
        for saved_stage in STAGES:
            expected = json.loads((folder / f"{saved_world}-{saved_stage}.json").read_text())
            stages = ((saved_stage + world) % len(STAGES),) if covering else STAGES
            for stage in stages:
                trained = build_at(stage, world, seed=1)
                state = Checkpoints(Store(folder / f"{saved_world}-{saved_stage}", keep=1)).load_newest(trained)
                assert state is not None and state.step == BEFORE
                found = [*train(trained, state, AFTER, rank, world), average_norm(trained)]
                case = f"{saved_world} ranks, stage {saved_stage} -> {world} ranks, stage {stage}"
                apart[case] = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    return apart


def matrix(to: str, *what: str) -> dict[str, float]:
    """The largest relative difference of a loss by case; `to` is the folder of the checkpoints.

    "save" trains at every stage, writes a checkpoint, and goes on for ten steps. Then, at every stage, what was saved
    at the world sizes of the last argument, "1,2", is loaded and makes the same ten steps; with "covering" each
    checkpoint at one other stage only.
    """
    folder, rank, world = Path(to), dist.get_rank(), dist.get_world_size()
    if "save" in what:
        save(folder, rank, world)
    if not what[-1][0].isdigit():
        return {}
    return resume(folder, rank, world, [int(number) for number in what[-1].split(",")], "covering" in what)
