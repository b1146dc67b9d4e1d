"""Run by test_gradients.py under torchrun: the gradient that reaches the optimizer, against plain autograd.

    torchrun --nproc-per-node W tests/engine/gradient_matrix.py

One case after the other in one process group: every ZeRO stage, with and without gradient caching, both losses, with
and without holes. Prints one JSON object: the largest relative difference of any tensor by case, the temperature's
apart.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from against_autograd import MODEL  # beside this script
from deepspeed.utils import safe_get_full_grad

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist import process_group
from cmpt.dist.process_group import sum_over_ranks
from cmpt.engine.build import build_engine
from cmpt.engine.step import clip_step
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Image, Loss, Masking, Model, Optimizer

BATCH = 12
HOLES = [2, 7]
STAGES, MICRO, LOSSES = (0, 1, 2, 3), (None, 1, 2), ("infonce", "sigmoid")


def model_of(loss: str) -> Model:
    return replace(MODEL, logit_bias_init=-3.0 if loss == "sigmoid" else None)


def rows_of(rows: list[int], holes: list[int]) -> tuple[PackedPatches, PackedText, torch.Tensor]:
    """Some rows of the one global batch: images of unequal lengths, captions of unequal lengths, what is valid."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 61, (BATCH, 8), generator=generator)
    valid = torch.tensor([row not in holes for row in rows])
    masking = Masking(strategy="cluster", threshold=0.1, min_ratio=0.3)
    stage = MaskStage(masking, Image(size=32), 8, seed=0)
    patches = stage(images[rows], torch.tensor(rows), valid).patches
    order = sorted(range(len(rows)), key=lambda k: -(2 + rows[k] % 5))
    lengths = [2 + rows[k] % 5 for k in order]
    text = PackedText(
        torch.cat([ids[rows[k], :length] for k, length in zip(order, lengths, strict=True)]),
        torch.cat([torch.arange(length) for length in lengths]),
        lengths,
        torch.tensor(order),
    )
    return patches, text, valid


def expected_gradients(loss: str, holes: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Plain torch in one process, the losses written out."""
    clip = CLIP(model_of(loss), 32, seed=0)
    patches, text, valid = rows_of(list(range(BATCH)), holes)
    image, words, scale, bias = clip(patches, text, BATCH)
    image, words = image[valid], words[valid]
    logits = scale * image @ words.T
    if loss == "sigmoid":
        signs = 2 * torch.eye(len(logits)) - 1
        value = -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)
    else:
        own = torch.arange(len(logits))
        value = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    value.backward()
    return float(value), {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


def main() -> None:
    rank, world, device = process_group.start()
    own = list(range(rank * BATCH // world, (rank + 1) * BATCH // world))
    found: dict[str, Any] = {}
    for loss, holes in itertools.product(LOSSES, ([], HOLES)):
        expected_loss, expected = expected_gradients(loss, holes)
        for stage, micro in itertools.product(STAGES, MICRO):
            settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage)
            engine = build_engine(CLIP(model_of(loss), 32, seed=0), settings, Optimizer(), world, device)
            gradients: dict[str, torch.Tensor] = {}

            def note(engine: Any = engine, gradients: dict[str, torch.Tensor] = gradients) -> None:
                for name, p in engine.module.named_parameters():
                    full = p.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(p)
                    gradients[name] = full.detach().clone()

            engine.step = note
            patches, text, valid = rows_of(own, holes)
            valid_B = valid if holes else None
            result = clip_step(engine, patches, text, valid_B, 0.0, Loss(kind=loss, chunk_rows=3), True, micro)
            norm = sum(float(g.double().pow(2).sum()) for g in expected.values()) ** 0.5
            apart = {
                name: float((gradients[name] - g).norm() / g.norm().clamp_min(1e-3 * norm))
                for name, g in expected.items()
            }
            assert gradients.keys() == expected.keys() and result.gradient_norms is not None
            scalars = [apart.pop(name) for name in ("logit_scale", "logit_bias") if name in apart]
            total = float(sum_over_ranks(result.loss.double())) / world
            found[f"{loss} holes={len(holes)} stage={stage} micro={micro}"] = {
                "gradient": max(apart.values()),
                "temperature": max(scalars),
                "loss": abs(total - expected_loss) / expected_loss,
                "norm": abs(result.gradient_norms["total"] - norm) / norm,
            }
    if rank == 0:
        print(json.dumps(found))
    process_group.stop()


if __name__ == "__main__":
    main()
