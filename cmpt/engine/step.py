"""One training step: forward, gather, loss, backward, ZeRO step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist.process_group import gather_with_gradient, sum_over_ranks
from cmpt.engine import sharded
from cmpt.losses.contrastive import info_nce
from cmpt.losses.sigmoid import sigmoid_loss
from cmpt.recipe.schema import Loss


class TrainingDivergedError(RuntimeError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves; tensors stay on the device until someone logs them."""

    loss: Tensor  # [], of this rank's rows; the mean over ranks is the loss of the global batch
    logit_scale: Tensor  # [1], exp already taken
    logit_bias: Tensor | None  # [1], with the sigmoid loss
    gradient_norms: dict[str, float] | None  # by tower and "total", before clipping; only if asked for

    def global_loss(self, step: int) -> float:
        """Collective. Raises TrainingDivergedError, on every rank, so that such a state is not logged or saved."""
        loss = float(sum_over_ranks(self.loss.detach().double().cpu())) / dist.get_world_size()
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"step {step}: the loss is {loss}; the newest checkpoint is from before that")
        return loss


def clip_step(
    engine: deepspeed.DeepSpeedEngine,
    images: PackedPatches,
    text: PackedText,
    valid_B: Tensor | None,
    lr: float,
    loss: Loss,
    with_gradient_norms: bool,
) -> StepResult:
    """Step the model on one batch; every rank calls it with its own rows, as many on every rank.

    `valid_B` [B] bool on every rank, or None on every rank: pairs to leave out of the loss. The gradient is that of the
    global loss at any world size: local rows against gathered columns, gathered with gradient, mean over ranks.
    """
    rows = len(text.lengths)
    sharded.set_learning_rate(engine, lr)
    image_BE, text_BE, scale, bias = engine(images, text, rows)
    pair_G2E = gather_with_gradient(torch.cat([image_BE, text_BE], dim=1))
    image_GE, text_GE = pair_G2E.chunk(2, dim=1)
    valid_G = None if valid_B is None else gather_with_gradient(valid_B.to(torch.int64)).bool()
    how: dict[str, Any] = {"first_row": dist.get_rank() * rows, "chunk_rows": loss.chunk_rows, "valid_G": valid_G}
    if loss.kind == "sigmoid":
        assert bias is not None
        value = sigmoid_loss(image_BE, text_GE, scale, bias, **how)
    else:
        value = info_nce(image_BE, text_BE, image_GE, text_GE, scale, **how)
    engine.backward(value)
    norms = sharded.gradient_norms(engine) if with_gradient_norms else None
    engine.step()
    return StepResult(value.detach(), scale.detach(), None if bias is None else bias.detach(), norms)
