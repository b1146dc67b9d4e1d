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
    micro_batch_size: int | None = None,
) -> StepResult:
    """Step the model on one batch; every rank calls it with its own rows, as many on every rank.

    `valid_B` [B] bool on every rank, or None on every rank: pairs to leave out of the loss. The gradient is that of the
    global loss at any world size: local rows against gathered columns, gathered with gradient, mean over ranks.
    With `micro_batch_size` below B, activations of that many pairs are held at once (see `_backward_in_parts`).
    """
    rows = len(text.lengths)
    sharded.set_learning_rate(engine, lr)
    if micro_batch_size is None or micro_batch_size >= rows:
        outputs = engine(images, text, rows)
        value = _global_loss(outputs, valid_B, loss)
        engine.backward(value)
    else:
        parts = -(-rows // micro_batch_size)
        outputs, value = _backward_in_parts(engine, images, text, valid_B, loss, parts)
    *_, scale, bias = outputs
    norms = sharded.gradient_norms(engine) if with_gradient_norms else None
    engine.step()
    return StepResult(value.detach(), scale.detach(), None if bias is None else bias.detach(), norms)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""What the model returns: image_BE, text_BE, scale [1], bias [1] or None."""


def _global_loss(outputs: Outputs, valid_B: Tensor | None, loss: Loss) -> Tensor:
    """The loss of this rank's rows; its mean over ranks is the global loss."""
    image_BE, text_BE, scale, bias = outputs
    valid_G = None if valid_B is None else gather_with_gradient(valid_B.to(torch.int64)).bool()
    how: dict[str, Any] = {
        "first_row": dist.get_rank() * len(image_BE),
        "chunk_rows": loss.chunk_rows,
        "valid_G": valid_G,
    }
    if loss.kind == "sigmoid":
        assert bias is not None
        return sigmoid_loss(image_BE, gather_with_gradient(text_BE), scale, bias, **how)
    image_GE, text_GE = gather_with_gradient(torch.cat([image_BE, text_BE], dim=1)).chunk(2, dim=1)
    return info_nce(image_BE, text_BE, image_GE, text_GE, scale, **how)


def _backward_in_parts(
    engine: deepspeed.DeepSpeedEngine,
    images: PackedPatches,
    text: PackedText,
    valid_B: Tensor | None,
    loss: Loss,
    parts: int,
) -> tuple[Outputs, Tensor]:
    """Gradient caching (GradCache, arXiv 2101.06983): the same gradient with the activations of one part at a time.

    First all features without gradient, then the loss and its gradient with respect to the features, then every part
    once more, with that gradient fed into it. Masks and crops are in the batch already, so both passes see the same.
    """
    rows = len(text.lengths)
    batches = [(images.part(number, parts), text.part(number, parts)) for number in range(parts)]
    with torch.no_grad():
        image_BE, text_BE, scale, bias = engine(*batches[0], rows)
        for batch in batches[1:]:  # rows that are not in a part are zero in its output
            image, words, *_ = engine(*batch, rows)
            image_BE, text_BE = image_BE + image, text_BE + words
    outputs: Outputs = (image_BE, text_BE, scale, bias)
    leaves = tuple(None if output is None else output.detach().requires_grad_() for output in outputs)
    value = _global_loss(leaves, valid_B, loss)  # type: ignore[arg-type]
    value.backward()
    with sharded.one_reduction(engine):
        for number, batch in enumerate(batches):
            again = engine(*batch, rows)
            # Temperature and bias are in every part's output, and count once.
            weights = (1.0, 1.0, float(number == 0), float(number == 0))
            terms = [
                (output * (leaf.grad * weight)).sum()
                for output, leaf, weight in zip(again, leaves, weights, strict=True)
                if leaf is not None and leaf.grad is not None
            ]
            engine.backward(torch.stack(terms).sum())
    return outputs, value
