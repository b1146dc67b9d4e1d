"""The sigmoid loss over the global batch, in chunks of rows: each pair is a yes-or-no question."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _ChunkedSigmoid(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows; the backward pass only scales, in place, what forward found.

    A chunk's logits turn into the gradient by them; only the terms of the loss stand beside them.
    """

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
        hole_G = None if valid_G is None else ~valid_G
        loss = image_BE.new_zeros((), dtype=torch.float64)
        by_scale, by_bias = torch.zeros_like(loss), torch.zeros_like(loss)
        grad_image_BE, grad_text_GE = torch.empty_like(image_BE), torch.zeros_like(text_GE)
        matrix = image_BE.new_empty(chunk_rows, text_GE.shape[0])
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, rows))
            logits = torch.mm(image_BE[chunk], text_GE.T, out=matrix[: chunk.stop - start]).mul_(scale).add_(bias)
            own = torch.arange(first_row + chunk.start, first_row + chunk.stop, device=logits.device)[:, None]
            # -log sigmoid(z) where the pair belongs together, -log sigmoid(-z) elsewhere; the two differ by z.
            terms = F.softplus(logits).scatter_add_(1, own, -logits.gather(1, own))
            residual = logits.sigmoid_().scatter_add_(1, own, -torch.ones_like(own, dtype=logits.dtype))
            if hole_G is not None:
                for values in (terms, residual):
                    values.masked_fill_(hole_G, 0.0).masked_fill_(hole_G[own], 0.0)
            loss += terms.sum(dim=1).sum(dtype=torch.float64)
            by_bias += residual.sum(dim=1).sum(dtype=torch.float64)
            torch.mm(residual, text_GE, out=grad_image_BE[chunk])
            grad_text_GE.addmm_(residual.T, image_BE[chunk])
            # The sum of residual * cosine, without the matrix of cosines.
            by_scale += (grad_image_BE[chunk] * image_BE[chunk]).sum(dim=1).sum(dtype=torch.float64)
            del terms  # not beside the next chunk's
        ctx.grads = [grad.mul_(scale * weight) for grad in (grad_image_BE, grad_text_GE)]
        ctx.grads += [
            (by_scale * weight).to(scale.dtype).view_as(scale),
            (by_bias * weight).to(bias.dtype).view_as(bias),
        ]
        return (loss * weight).to(image_BE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.grads:
            raise RuntimeError("the gradient of the loss was taken before; it is kept for one time only")
        found, ctx.grads = ctx.grads, []
        return *(saved.mul_(grad) for saved in found), None, None, None


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
    Memory beside the inputs: 4 (2 * chunk_rows * G + (B + G) E) bytes, a chunk of logits, one of terms, and the
    gradients, which the backward pass hands out; so it can run once. Logits are fp32, sums over rows fp64.
    Source: SigLIP, arXiv 2303.15343, equation 1 and algorithm 1.
    """
    assert image_BE.dtype == torch.float32, "the loss is computed in fp32"
    return _ChunkedSigmoid.apply(image_BE, text_GE, scale, bias, valid_G, first_row, min(chunk_rows, image_BE.shape[0]))
