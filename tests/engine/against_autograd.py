"""Run by test_sharded.py under torchrun: train a few steps with DeepSpeed and with plain torch, and compare.

    torchrun --nproc-per-node W tests/engine/against_autograd.py STAGE

Halfway the engine is thrown away and a new one is filled from its full state, as a resume does. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist import process_group
from cmpt.dist.process_group import sum_over_ranks
from cmpt.engine import sharded
from cmpt.engine.build import build_engine
from cmpt.engine.step import clip_step
from cmpt.losses.contrastive import info_nce
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP, parameter_groups
from cmpt.recipe.schema import Engine, Image, Loss, Masking, Model, Optimizer, Text, Vision

BATCH, STEPS, TEXT = 8, 4, 5
MODEL = Model(
    patch_size=8,
    embed_dim=20,
    vision=Vision(width=36, layers=2, heads=2),
    text=Text(width=28, layers=2, heads=2),
    context_length=8,
    vocab_size=61,
)
OPTIMIZER = Optimizer(lr=1e-2)


def rows_of(step: int, rows: list[int]) -> tuple[PackedPatches, PackedText]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 61, (BATCH, TEXT), generator=generator)
    stage = MaskStage(Masking(strategy="random"), Image(size=32), 8, seed=0)
    patches = stage(images[rows], torch.tensor(rows) + step * BATCH).patches
    count = len(rows)
    text = PackedText(ids[rows].reshape(-1), torch.arange(TEXT).repeat(count), [TEXT] * count, torch.arange(count))
    return patches, text


def plain_optimizer(clip: CLIP) -> torch.optim.AdamW:
    groups = [
        {"params": list(group.values()), "weight_decay": OPTIMIZER.weight_decay if name.endswith(".decay") else 0.0}
        for name, group in parameter_groups(clip).items()
    ]
    return torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)


def main() -> None:
    stage = int(sys.argv[1])
    rank, world, device = process_group.start()
    settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage)

    def new_engine():
        return build_engine(CLIP(MODEL, 32, seed=0), settings, OPTIMIZER, world, device)

    reference = CLIP(MODEL, 32, seed=0)
    adamw = plain_optimizer(reference)
    engine = new_engine()
    losses, norms, round_trip = [], [], True
    for step in range(STEPS):
        if step == STEPS // 2:
            before = dict(sharded.full_state(engine))
            steps = sharded.optimizer_steps(engine)
            engine = new_engine()
            sharded.load_full_state(engine, before, steps)
            after = dict(sharded.full_state(engine))
            round_trip = all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n])
            round_trip = round_trip and sharded.optimizer_steps(engine) == steps == step
        image, text, scale, _ = reference(*rows_of(step, list(range(BATCH))), BATCH)
        loss = info_nce(image, text, image, text, scale)
        adamw.zero_grad()
        loss.backward()
        norm = {
            part: sum(
                float(p.grad.double().pow(2).sum()) for n, p in reference.named_parameters() if n.startswith(part)
            )
            ** 0.5
            for part in ("visual", "text")
        }
        adamw.step()
        own = BATCH // world
        patches, text_rows = rows_of(step, list(range(rank * own, (rank + 1) * own)))
        result = clip_step(engine, patches, text_rows, None, OPTIMIZER.lr, Loss(chunk_rows=3), True)
        total = float(sum_over_ranks(result.loss.double())) / world
        losses.append(abs(total - float(loss)) / float(loss))
        assert result.gradient_norms is not None
        norms += [abs(result.gradient_norms[part] - norm[part]) / norm[part] for part in norm]
    final = {name: values["param"] for name, values in sharded.full_state(engine)}
    moved = CLIP(MODEL, 32, seed=0).state_dict()
    distance = max(
        float((final[n] - p.detach()).norm() / (moved[n] - p.detach()).norm()) for n, p in reference.named_parameters()
    )
    if rank == 0:
        print(json.dumps({"loss": max(losses), "norm": max(norms), "parameters": distance, "round_trip": round_trip}))
    process_group.stop()


if __name__ == "__main__":
    main()
