"""One training step: forward, gather, loss, backward; then, if nothing speaks against it, the ZeRO step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.batch import PackedPatches, PackedText
from cmpt.dist.process_group import gather_with_gradient
from cmpt.engine import sharded
from cmpt.engine.build import Trained
from cmpt.losses.contrastive import info_nce
from cmpt.losses.sigmoid import sigmoid_loss
from cmpt.recipe.schema import Loss


@dataclass(frozen=True)
class StepResult:
    """What a step found; the gradient itself is in the engine, reduced over ranks, scaled by `loss_scale`."""

    loss: float  # of the global batch
    gradient_norms: dict[str, float]  # of the global gradient by tower and "total", before clipping
    logit_scale: Tensor  # [1], exp already taken; stays on the device until someone logs it
    logit_bias: Tensor | None  # [1], with the sigmoid loss
    loss_scale: float

    @property
    def overflowed(self) -> bool:
        """fp16 met a number beyond its range; with a smaller scale it may not."""
        return self.loss_scale > 1 and math.isfinite(self.loss) and not math.isfinite(self.gradient_norms["total"])


def find_gradient(
    trained: Trained,
    images: PackedPatches,
    text: PackedText,
    valid_B: Tensor | None,
    loss: Loss,
    micro_batch_size: int | None = None,
) -> StepResult:
    """Loss and gradient of one batch; every rank calls it with its own rows, as many on every rank.

    `valid_B` [B] bool on every rank, or None on every rank: pairs to leave out of the loss. The gradient is that of the
    global loss at any world size: local rows against gathered columns, gathered with gradient, mean over ranks.
    With `micro_batch_size` below B, activations of that many pairs are held at once (see `_backward_in_parts`).
    Exactly one of `take_step` and `drop_step` must follow.
    """
    rows, engine, scale = len(text.lengths), trained.engine, trained.loss_scale.value
    if micro_batch_size is None or micro_batch_size >= rows:
        outputs = engine(images, text, rows)
        value = _global_loss(outputs, valid_B, loss)
        engine.backward(value * scale if scale != 1 else value)
    else:
        parts = -(-rows // micro_batch_size)
        outputs, value = _backward_in_parts(trained, images, text, valid_B, loss, parts)
    *_, logit_scale, bias = outputs
    mean, norms = sharded.loss_and_norms(engine, value, scale)
    return StepResult(mean, norms, logit_scale.detach(), None if bias is None else bias.detach(), scale)


def take_step(trained: Trained, result: StepResult, lr: float, clip_norm: float | None) -> None:
    """Step the optimizer with the gradient just found, cut to a global norm of `clip_norm` if it is larger."""
    factor, norm = 1 / result.loss_scale, result.gradient_norms["total"]
    if clip_norm is not None and norm > clip_norm:
        factor *= clip_norm / norm
    if factor != 1:
        sharded.scale_gradients(trained.engine, factor)
    sharded.step(trained.engine, lr)
    trained.loss_scale.succeeded()
    if trained.average is not None:
        trained.average.follow(trained.engine)


def drop_step(trained: Trained, result: StepResult) -> None:
    """Forget the gradient just found: weights, moments and average stay as they are."""
    sharded.discard(trained.engine)
    if result.overflowed:
        trained.loss_scale.failed()


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
    trained: Trained, images: PackedPatches, text: PackedText, valid_B: Tensor | None, loss: Loss, parts: int
) -> tuple[Outputs, Tensor]:
    """Gradient caching (GradCache, arXiv 2101.06983): the same gradient with the activations of one part at a time.

    First all features without gradient, then the loss and its gradient with respect to the features, then every part
    once more, with that gradient fed into it. Masks and crops are in the batch already, so both passes see the same.
    """
    rows, engine = len(text.lengths), trained.engine
    batches = [(images.part(number, parts), text.part(number, parts)) for number in range(parts)]
    with torch.no_grad():
        image_BE, text_BE, scale, bias = engine(*batches[0], rows)
        for batch in batches[1:]:  # rows that are not in a part are zero in its output
            image, words, *_ = engine(*batch, rows)
            image_BE, text_BE = image_BE + image, text_BE + words
    outputs: Outputs = (image_BE, text_BE, scale, bias)
    leaves = tuple(None if output is None else output.detach().requires_grad_() for output in outputs)
    value = _global_loss(leaves, valid_B, loss)  # type: ignore[arg-type]
    (value * trained.loss_scale.value).backward()
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
