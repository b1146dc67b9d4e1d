"""The sigmoid loss over the global batch, in chunks of rows: each pair is a yes-or-no question."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedSigmoid(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows; the backward pass only scales what forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_GE: Tensor,
        scale: Tensor,
        bias: Tensor,
        valid_G: Tensor | None,
        first_row: int,
        chunk_rows: int,
    ) -> Tensor:
        rows = image_BE.shape[0]
        # Divided by the valid rows of all ranks, times the world size, since ranks average their losses.
        pairs = text_GE.shape[0] if valid_G is None else max(1, int(valid_G.sum()))
        weight = text_GE.shape[0] / rows / pairs
        loss = image_BE.new_zeros((), dtype=torch.float64)
        grads = [torch.zeros_like(t) for t in (image_BE, text_GE, scale, bias)]
        grad_image_BE, grad_text_GE, grad_scale, grad_bias = grads
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            cosine = image_BE[chunk] @ text_GE.T
            logits = cosine * scale + bias
            own = torch.arange(first_row + chunk.start, first_row + chunk.stop, device=logits.device)[:, None]
            # -log sigmoid(z) where the pair belongs together, -log sigmoid(-z) elsewhere; the two differ by z.
            terms = F.softplus(logits).scatter_add_(1, own, -logits.gather(1, own))
            residual = logits.sigmoid_().scatter_add_(1, own, -torch.ones_like(own, dtype=logits.dtype))
            if valid_G is not None:
                hole = ~(valid_G[own] & valid_G)
                terms.masked_fill_(hole, 0.0)
                residual.masked_fill_(hole, 0.0)
            residual.mul_(weight)
            loss += terms.sum(dtype=torch.float64) * weight
            grad_scale += (residual * cosine).sum()
            grad_bias += residual.sum()
            grad_image_BE[chunk] = residual @ text_GE * scale
            grad_text_GE += residual.T @ image_BE[chunk] * scale
        ctx.save_for_backward(*grads)
        return loss.to(image_BE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return *(saved * grad for saved in ctx.saved_tensors), None, None, None


def sigmoid_loss(
    image_BE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    first_row: int = 0,
    chunk_rows: int = 1024,
    valid_G: Tensor | None = None,
) -> Tensor:
    """This rank's images against all captions of the batch; its mean over ranks is the global loss.

    image_BE: fp32 unit rows of this rank, which belong to rows first_row … first_row+B-1 of text_GE; scale, bias: [1];
    valid_G: bool, False leaves a pair out as row and as column (a hole).
    The sum over all pairs is divided by the number of rows, as in the paper.
    Memory: O(chunk_rows * G). Source: SigLIP, arXiv 2303.15343, equation 1 and algorithm 1.
    """
    assert image_BE.dtype == torch.float32, "the loss is computed in fp32"
    return _ChunkedSigmoid.apply(image_BE, text_GE, scale, bias, valid_G, first_row, min(chunk_rows, image_BE.shape[0]))
