"""The matrices of test_guards.py, test_dry_run.py and test_equal_weights.py: what guards do to an engine.

Every ZeRO stage, the optimizer in host memory too, with and without gradient caching; what is told by case is true on
all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from small import BATCH, IMAGE_SIZE, MODEL, own_rows, rows_of  # beside this script
from torch import Tensor

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist.process_group import gather_objects
from cmpt.engine import sharded
from cmpt.engine.build import Trained, build
from cmpt.engine.dry_run import dry_run, largest_batch
from cmpt.engine.equal_weights import unequal_weights
from cmpt.engine.step import StepResult, drop_step, find_gradient, take_step
from cmpt.models.clip import CLIP
from cmpt.monitor.guard import LossGuard
from cmpt.recipe import phases
from cmpt.recipe.schema import Engine, Guard, Image, Loss, Masking, Optimizer, Recipe, Run

LR, CLIP_NORM = 1e-2, 0.5
STAGES = ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))  # stage, offloaded
MICRO = (None, 2)
Batch = tuple[PackedPatches, PackedText]


def stages() -> list[tuple[int, bool]]:
    """One process is always at stage 0, unless it offloads."""
    return [(stage, offload) for stage, offload in STAGES if dist.get_world_size() > 1 or offload or stage == 0]


def new_engine(stage: int, offload: bool = False, precision: str = "fp32", **more: Any) -> Trained:
    settings = Engine(batch_size=BATCH, precision=precision, zero_stage=stage, offload_optimizer=offload, **more)
    world = dist.get_world_size()
    clip = CLIP(MODEL, IMAGE_SIZE, seed=0)
    return build(clip, settings, Optimizer(lr=LR, ema_decay=0.9), world, torch.device("cpu"))


def batch_of(step: int) -> Batch:
    patches, text, _ = rows_of(own_rows(dist.get_rank(), dist.get_world_size()), [], step)
    return patches, text


def gradient_of(trained: Trained, batch: Batch, micro: int | None) -> StepResult:
    return find_gradient(trained, *batch, None, Loss(chunk_rows=3), micro)


def train(trained: Trained, steps: range, micro: int | None) -> list[float]:
    losses = []
    for step in steps:
        result = gradient_of(trained, batch_of(step), micro)
        take_step(trained, result, LR, CLIP_NORM)
        losses.append(result.loss)
    return losses


def snapshot(trained: Trained) -> dict[str, list[Tensor]]:
    """All that a step changes: masters, moments and average, and what the towers compute with.

    At stage 3 that is what this rank holds of a parameter: some are whole after a step, in pieces after a dropped one.
    """
    pieces = sharded.pieces(trained.engine)  # what lies between them is padding, and never set
    kept = {
        kind: [piece.of(tensors).detach().clone() for piece in pieces]
        for kind, tensors in sharded.kept_tensors(trained.engine, trained.average).items()
    }
    own = [getattr(p, "ds_tensor", p).detach().view(-1) for p in trained.clip.parameters()]
    if trained.engine.zero_optimization_stage() == 3:
        held = {piece.name: piece.numel for piece in pieces}
        own = [flat[: held.get(n, 0)] for (n, _), flat in zip(trained.clip.named_parameters(), own, strict=True)]
    kept["computed with"] = [flat.clone() for flat in own]
    kept["counters"] = [torch.tensor([sharded.optimizer_steps(trained.engine), trained.loss_scale.value])]
    return kept


def alike(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> bool:
    """Bit by bit."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for kind in ours
        for a, b in zip(ours[kind], theirs[kind], strict=True)
    )


def on_all_ranks(holds: bool) -> bool:
    return all(gather_objects(holds))


def poisoned(what: str, trained: Trained, micro: int | None) -> StepResult:
    """The gradient of a batch that is spoilt on the last rank alone."""
    patches, text = batch_of(77)
    last = dist.get_rank() == dist.get_world_size() - 1
    kind, place = what.split(" in ")
    value = float(kind)
    if place == "pixels":
        if last:
            patches.patches_TP[len(patches.patches_TP) // 2, 3] = value
        return gradient_of(trained, (patches, text), micro)
    parameter = dict(trained.clip.named_parameters())[place]

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    hook = parameter.register_hook(spoil) if last else None
    try:
        return gradient_of(trained, (patches, text), micro)
    finally:
        if hook is not None:
            hook.remove()


WEIGHT = "visual.transformer.blocks.1.c_fc.weight"
POISONS = ("nan in pixels", "inf in pixels", "nan in text.proj.weight", "inf in visual.ln_post.bias")


def refused(every: int = 1) -> dict[str, Any]:
    """Each poison is refused on all ranks for the same reason, and leaves nothing behind; then overflows of fp16.

    Half of the cases (`every` = 2) has each stage with or without caching, and caching with every second stage.
    """
    found: dict[str, Any] = {}
    for (i, (stage, offload)), (j, micro) in itertools.product(enumerate(stages()), enumerate(MICRO)):
        if (i + j) % every:
            continue
        expected_losses = train(reference := new_engine(stage, offload), range(4), micro)
        expected = snapshot(reference)
        trained = new_engine(stage, offload)
        guard = LossGuard(Guard(), {})
        faults: list[str | None] = []

        untouched = [stays_as_it_was(trained, guard, micro, faults)]  # before the first step there are no moments
        losses = train(trained, range(2), micro)
        untouched.append(stays_as_it_was(trained, guard, micro, faults))
        losses += train(trained, range(2, 4), micro)
        found[f"stage={stage} offload={offload} micro={micro}"] = {
            "faults": faults,
            "same faults": len(set(map(tuple, gather_objects(faults)))) == 1,
            "untouched": [on_all_ranks(held) for held in untouched],
            "losses as without": on_all_ranks(losses == expected_losses),
            "weights as without": on_all_ranks(alike(expected, snapshot(trained))),
        }
    for (stage, offload), micro in list(zip(stages(), itertools.cycle(MICRO), strict=False))[::every]:
        found[f"fp16 stage={stage} offload={offload} micro={micro}"] = overflows(stage, offload, micro)
    return found


def stays_as_it_was(trained: Trained, guard: LossGuard, micro: int | None, faults: list[str | None]) -> bool:
    """Whether all poisons, one after the other, leave the engine as it was; what the guard says of each to `faults`."""
    before = snapshot(trained)
    for poison in POISONS:
        result = poisoned(poison, trained, micro)
        faults.append(guard.judge(result.loss, result.gradient_norms["total"]))
        drop_step(trained, result)
    return alike(before, snapshot(trained))


def overflows(stage: int, offload: bool, micro: int | None) -> dict[str, Any]:
    trained = new_engine(stage, offload, precision="fp16")
    trained.loss_scale.value = 2.0**60
    weights = snapshot(trained)["param"]
    overflow = gradient_of(trained, batch_of(0), micro)
    drop_step(trained, overflow)
    halved = trained.loss_scale.value
    trained.loss_scale.value = 1024.0
    spoilt = poisoned("nan in pixels", trained, micro)
    drop_step(trained, spoilt)
    kept = trained.loss_scale.value
    held = alike({"param": weights}, {"param": snapshot(trained)["param"]})
    result = gradient_of(trained, batch_of(0), micro)
    drop_step(trained, result)
    return {
        "overflowed": on_all_ranks(overflow.overflowed),
        "halved": halved == 2.0**59,
        "a nan in the batch is no overflow": on_all_ranks(not spoilt.overflowed) and kept == 1024.0,
        "untouched": on_all_ranks(held),
        "then finite": on_all_ranks(not result.overflowed and result.loss == overflow.loss),
    }


def dry_runs(every: int = 1) -> dict[str, Any]:
    """A dry run before the first step, and one in the middle, changes nothing that comes later; bit by bit.

    Half of the cases (`every` = 2) has each stage with or without caching, and every second stage in fp16.
    """
    recipe = Recipe(
        run=Run(duration="4 steps"),
        model=MODEL,
        image=Image(size=IMAGE_SIZE),
        masking=Masking(strategy="none"),
        loss=Loss(chunk_rows=3),
    )
    largest = largest_batch(recipe, phases(recipe), BATCH // dist.get_world_size())
    found: dict[str, Any] = {}
    pairs = itertools.product(enumerate(stages()), enumerate(MICRO))
    cases = [(*which, micro, "fp32") for (i, which), (j, micro) in pairs if (i + j) % every == 0]
    cases += [(stage, offload, None, "fp16") for stage, offload in stages()[::every]]
    for stage, offload, micro, precision in cases:
        recipe.engine = Engine(batch_size=BATCH, micro_batch_size=micro, zero_stage=stage)
        reference, trained = (new_engine(stage, offload, precision) for _ in range(2))
        for engine in (reference, trained):
            engine.loss_scale.value = 2.0**60 if precision == "fp16" else 1.0  # a dry run would overflow
        untouched = []
        steps = range(2)
        losses: list[list[float]] = [[], []]
        for _ in range(2):
            before = snapshot(trained)
            seconds = dry_run(trained, recipe, largest)
            untouched.append(on_all_ranks(alike(before, snapshot(trained)) and seconds > 0))
            if precision == "fp32":
                for engine, kept in zip((reference, trained), losses, strict=True):
                    kept += train(engine, steps, micro)
            steps = range(2, 4)
        found[f"{precision} stage={stage} offload={offload} micro={micro}"] = {
            "untouched": all(untouched),
            "losses as without": on_all_ranks(losses[0] == losses[1]),
            "weights as without": on_all_ranks(alike(snapshot(reference), snapshot(trained))),
        }
    return found


def weights() -> dict[str, Any]:
    """Flips of one bit on the last rank: seen at once, and after a step more; of a copy and, above stage 0, a master.

    Stage 3 twice: with all parameters small enough that every rank keeps them whole, and with none.
    """
    found: dict[str, Any] = {}
    pieces_only = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    for stage, offload, more in (*((s, o, {}) for s, o in STAGES), (3, False, pieces_only)):
        trained = new_engine(stage, offload, deepspeed=more)
        alarms = []
        for step in range(20):
            result = gradient_of(trained, batch_of(step), None)
            alarms.append(unequal_weights(trained))
            if step % 5 == 4:
                drop_step(trained, result)
            else:
                take_step(trained, result, LR, CLIP_NORM)
            alarms.append(unequal_weights(trained))
        case: dict[str, Any] = {"false alarms": [alarm for alarm in alarms if alarm]}
        copies = {} if more else {name: partial(copy_of, trained, name) for name in (WEIGHT, "logit_scale")}
        others = {"master": partial(master, trained)} if stage else {"average": partial(average, trained)}
        for name, value in (copies | others).items():
            for when, steps in (("at once", 0), ("a step later", 1)):
                case[f"{name} {when}"] = after_flip(trained, value, steps)
                put_right(trained)
        found[f"stage={stage} offload={offload}" + " pieces only" * bool(more)] = case
    return found


def copy_of(trained: Trained, name: str) -> Tensor:
    """The middle element of what the towers of this rank compute with."""
    flat = dict(trained.clip.named_parameters())[name].detach().view(-1)
    return flat[len(flat) // 2 :][:1]


def master(trained: Trained) -> Tensor:
    """The first of the weights that the optimizer steps on this rank."""
    return sharded.pieces(trained.engine)[-1].of(sharded.flat_parameters(trained.engine)).detach()[:1]


def average(trained: Trained) -> Tensor:
    assert trained.average is not None
    return trained.average.flats[3].view(-1)[:1]


def after_flip(trained: Trained, value: Callable[[], Tensor], steps: int) -> str | None:
    """Flip a low bit of the mantissa on the last rank, go on for so many steps, and compare the ranks."""
    if dist.get_rank() == dist.get_world_size() - 1:
        value().view(torch.int32).bitwise_xor_(1 << 12)
    train(trained, range(50, 50 + steps), None)
    return unequal_weights(trained)


def put_right(trained: Trained) -> None:
    """Rank 0's weights and moments for all at stage 0; above, one step lets the copies follow the masters."""
    if trained.engine.zero_optimization_stage() == 0:
        for tensors in sharded.kept_tensors(trained.engine, trained.average).values():
            for tensor in tensors:
                dist.broadcast(tensor, 0)
    else:
        train(trained, range(60, 61), None)
    assert unequal_weights(trained) is None


def matrix(which: str) -> dict[str, Any]:
    """`which`: refused, dry_run or weights; of the first two also half_refused and half_dry_run."""
    matrices = {"refused": refused, "dry_run": dry_runs, "weights": weights}
    return matrices[which.removeprefix("half_")](*([2] if which.startswith("half_") else []))
