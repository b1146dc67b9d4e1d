"""The matrix of test_gradients.py: the gradient that reaches the optimizer, against plain autograd."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from small import BATCH, IMAGE_SIZE, model_of, own_rows, rows_of  # beside this script

from cmpt.engine.build import build
from cmpt.engine.step import drop_step, find_gradient
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Engine, Loss, Optimizer

HOLES = [2, 7]
STAGES = ((0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True))  # stage, offloaded
MICRO, LOSSES = (None, 1, 2), ("infonce", "sigmoid")


def expected_gradients(loss: str, holes: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Plain torch in one process, the losses written out."""
    clip = CLIP(model_of(loss), IMAGE_SIZE, seed=0)
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


def matrix(cases: str) -> dict[str, Any]:
    """The largest relative difference of any tensor by case, the temperature's apart.

    Every ZeRO stage, the optimizer in host memory too, with and without gradient caching, both losses, with and without
    holes: `cases` is "all", or "third", which has every pair of these together.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = own_rows(rank, world)
    found: dict[str, Any] = {}
    for (i, loss), (j, holes) in itertools.product(enumerate(LOSSES), enumerate(([], HOLES))):
        expected_loss, expected = expected_gradients(loss, holes)
        for (k, (stage, offload)), (m, micro) in itertools.product(enumerate(STAGES), enumerate(MICRO)):
            if cases == "third" and (i + j + k + m) % 3:
                continue
            settings = Engine(batch_size=BATCH, precision="fp32", zero_stage=stage, offload_optimizer=offload)
            settings.deepspeed = {"zero_optimization": {}}  # one process keeps its stage, too
            trained = build(CLIP(model_of(loss), IMAGE_SIZE, seed=0), settings, Optimizer(), world, torch.device("cpu"))
            assert trained.engine.zero_optimization_stage() == stage
            patches, text, valid = rows_of(own, holes)
            valid_B = valid if holes else None
            result = find_gradient(trained, patches, text, valid_B, Loss(kind=loss, chunk_rows=3), micro)
            gradients = {
                name: (safe_get_full_grad(p) if trained.engine.zero_optimization_stage() else p.grad).detach().clone()
                for name, p in trained.clip.named_parameters()
            }
            drop_step(trained, result)
            norm = sum(float(g.double().pow(2).sum()) for g in expected.values()) ** 0.5
            apart = {
                name: float((gradients[name] - g).norm() / g.norm().clamp_min(1e-3 * norm))
                for name, g in expected.items()
            }
            assert gradients.keys() == expected.keys()
            scalars = [apart.pop(name) for name in ("logit_scale", "logit_bias") if name in apart]
            found[f"{loss} holes={len(holes)} stage={stage} offload={offload} micro={micro}"] = {
                "gradient": max(apart.values()),
                "temperature": max(scalars),
                "loss": abs(result.loss - expected_loss) / expected_loss,
                "norm": abs(result.gradient_norms["total"] - norm) / norm,
            }
    return found
