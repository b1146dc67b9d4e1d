"""The matrix of test_training.py: train with DeepSpeed and with plain torch, and compare."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import BATCH, IMAGE_SIZE, MODEL, own_rows, rows_of  # beside this script

from cmpt.dist import process_group
from cmpt.engine.build import build
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.parts import Parts
from cmpt.engine.step import drop_step, find_gradient, take_step
from cmpt.engine.store import Store
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

STEPS, LR = 4, 1e-2
STAGES = ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))  # stage, offloaded
OPTIMIZERS = {
    "plain": Optimizer(lr=LR),
    "everything": Optimizer(
        lr=LR, clip_norm=0.05, vision_layer_decay=0.7, text_layer_decay=0.9, ema_decay=0.8, weight_decay=0.3
    ),
}
# Written out by hand, for a model of two blocks: the power of the decay by the beginning of a parameter's name.
DEPTHS = {
    "transformer.blocks.0.": 2,
    "transformer.blocks.1.": 1,
    "ln_post.": 0,
    "ln_final.": 0,
    "proj.": 0,
    "": 3,
}


def share_of_rate(name: str, optimizer: Optimizer) -> float:
    tower, _, rest = name.partition(".")
    if tower == "logit_scale":
        return 1.0
    decay = optimizer.vision_layer_decay if tower == "visual" else optimizer.text_layer_decay
    return decay ** next(depth for start, depth in DEPTHS.items() if rest.startswith(start))


def reference(optimizer: Optimizer) -> dict[str, object]:
    """Plain torch on the whole batch: losses, norms by tower, and the last weights and average."""
    clip = CLIP(MODEL, IMAGE_SIZE, seed=0)
    groups = [
        {
            "params": [p],
            "lr": LR * share_of_rate(name, optimizer),
            "weight_decay": optimizer.weight_decay if p.ndim > 1 else 0.0,
        }
        for name, p in clip.named_parameters()
    ]
    adamw = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)
    average = {name: p.detach().clone() for name, p in clip.named_parameters()}
    losses, norms = [], []
    for step in range(STEPS):
        patches, text, _ = rows_of(list(range(BATCH)), [], step)
        image, words, scale, _ = clip(patches, text, BATCH)
        logits, own = scale * image @ words.T, torch.arange(BATCH)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        adamw.zero_grad()
        loss.backward()
        losses.append(float(loss))
        squares = {n: float(p.grad.double().pow(2).sum()) for n, p in clip.named_parameters() if p.grad is not None}
        towers = {tower: sum(s for n, s in squares.items() if n.startswith(tower)) for tower in ("visual", "text")}
        norms.append({part: square**0.5 for part, square in {**towers, "total": sum(squares.values())}.items()})
        if optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(clip.parameters(), optimizer.clip_norm)
        adamw.step()
        if optimizer.ema_decay is not None:
            for name, p in clip.named_parameters():
                average[name] = optimizer.ema_decay * average[name] + (1 - optimizer.ema_decay) * p.detach()
    return {
        "losses": losses,
        "norms": norms,
        "param": {name: p.detach() for name, p in clip.named_parameters()},
        "ema": average,
    }


def run(case: str, stages: list[tuple[int, bool]], optimizer: Optimizer, precision: str, folder: Path) -> dict:
    """Two steps at each of `stages`, with a checkpoint between them and one at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    store = Store(folder / case, keep=9)
    losses, norms = [], []
    for number, (stage, offload) in enumerate(stages):
        settings = Engine(batch_size=BATCH, precision=precision, zero_stage=stage, offload_optimizer=offload)
        settings.deepspeed = {"zero_optimization": {}}  # one process keeps its stage, too
        # Another seed: what comes from the checkpoint cannot have been there before.
        clip = CLIP(MODEL, IMAGE_SIZE, seed=number)
        trained = build(clip, settings, optimizer, world, torch.device("cpu"))
        checkpoints = Checkpoints(store)
        state = checkpoints.load_newest(trained) or TrainState()
        for step in range(state.step, state.step + STEPS // len(stages)):
            patches, text, _ = rows_of(own_rows(rank, world), [], step)
            result = find_gradient(trained, patches, text, None, Loss(chunk_rows=3))
            while result.overflowed:  # fp16: the first scales are too large
                drop_step(trained, result)
                result = find_gradient(trained, patches, text, None, Loss(chunk_rows=3))
            losses.append(result.loss)
            norms.append(result.gradient_norms)
            take_step(trained, result, LR, optimizer.clip_norm)
            state.advance({}, [])
        checkpoints.save(trained, state)
        checkpoints.finish()
        process_group.barrier()
    parts = Parts(store.final(STEPS))
    kinds = ("param", "ema") if optimizer.ema_decay else ("param",)
    return {"losses": losses, "norms": norms, **{kind: parts.full(kind) for kind in kinds}}


def apart(ours: dict, theirs: dict) -> dict[str, float]:
    """Relative differences; of weights relative to how far they have moved."""
    start = {name: p.detach() for name, p in CLIP(MODEL, IMAGE_SIZE, seed=0).named_parameters()}
    pairs = list(zip(ours["norms"], theirs["norms"], strict=True))
    found = {
        "loss": max(abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True)),
        "norm": max(abs(a[part] - b[part]) / b[part] for a, b in pairs for part in b),
    }
    for kind in ("param", "ema"):
        if kind in ours:
            found[kind] = max(
                float((ours[kind][n] - p).norm() / (p - start[n]).norm()) for n, p in theirs[kind].items()
            )
    return found


def matrix(to: str, cases: str) -> dict[str, dict[str, float]]:
    """The largest relative differences by case; checkpoints go to the folder `to`.

    Every ZeRO stage, the optimizer in host memory too, with clipping, layer-wise decay and an average of the weights.
    Halfway a checkpoint is written, the engine is thrown away, and one of another stage goes on from the checkpoint.
    `cases` is "all" or "half": every stage once, with the one or the other optimizer.
    """
    folder, found = Path(to), {}
    for i, (name, optimizer) in enumerate(OPTIMIZERS.items()):
        expected = reference(optimizer)
        for number, first in enumerate(STAGES):
            if cases == "half" and (i + number) % 2:
                continue
            second = STAGES[(number + 3) % len(STAGES)]
            case = f"{name} stages={first[0]}{'o' * first[1]}-{second[0]}{'o' * second[1]}"
            found[case] = apart(run(case, [first, second], optimizer, "fp32", folder), expected)
        for precision in ("bf16", "fp16") if cases == "all" else (("bf16", "fp16")[i],):
            case = f"{name} {precision}"
            found[case] = apart(run(case, [(1, False), (1, False)], optimizer, precision, folder), expected)
    return found
