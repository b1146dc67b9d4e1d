"""The contrastive loss over the global batch, in chunks of rows: the logit matrix never exists as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ChunkedInfoNCE(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows; the backward pass only scales, in place, what forward found.

    A chunk's logits turn into the gradient by them without a second matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_BE: Tensor,
        image_GE: Tensor,
        text_GE: Tensor,
        scale: Tensor,
        valid_G: Tensor | None,
        first_row: int,
        chunk_rows: int,
    ) -> Tensor:
        rows = image_BE.shape[0]
        # The mean is over the valid rows of all ranks, times the world size, since ranks average their losses.
        pairs = image_GE.shape[0] if valid_G is None else max(1, int(valid_G.sum()))
        weight = (image_GE.shape[0] / rows) / (2 * pairs)
        hole_G = None if valid_G is None else ~valid_G
        loss = image_BE.new_zeros((), dtype=torch.float64)
        by_scale = torch.zeros_like(loss)
        grad_image_BE, grad_text_BE = torch.empty_like(image_BE), torch.empty_like(text_BE)
        grad_image_GE, grad_text_GE = torch.zeros_like(image_GE), torch.zeros_like(text_GE)
        directions = (
            (image_BE, text_GE, grad_image_BE, grad_text_GE),
            (text_BE, image_GE, grad_text_BE, grad_image_GE),
        )
        matrix = image_BE.new_empty(chunk_rows, image_GE.shape[0])
        for queries, keys, grad_queries, grad_keys in directions:
            for start in range(0, rows, chunk_rows):
                chunk = slice(start, min(start + chunk_rows, rows))
                logits = torch.mm(queries[chunk], keys.T, out=matrix[: chunk.stop - start]).mul_(scale)
                if hole_G is not None:
                    logits.masked_fill_(hole_G, float("-inf"))
                own = torch.arange(first_row + chunk.start, first_row + chunk.stop, device=logits.device)[:, None]
                logits.sub_(logits.amax(dim=1, keepdim=True))
                own_logit = logits.gather(1, own)
                sums = logits.exp_().sum(dim=1, keepdim=True)
                row_loss = sums.log() - own_logit
                # d loss / d logits = softmax - one-hot, for every row at once, where the logits were.
                residual = logits.div_(sums).scatter_add_(1, own, -torch.ones_like(sums))
                if hole_G is not None:
                    hole_rows = hole_G[own]
                    row_loss.masked_fill_(hole_rows, 0.0)
                    residual.masked_fill_(hole_rows, 0.0)
                loss += row_loss.sum(dtype=torch.float64)
                torch.mm(residual, keys, out=grad_queries[chunk])
                grad_keys.addmm_(residual.T, queries[chunk])
                # The sum of residual * cosine, without the matrix of cosines.
                by_scale += (grad_queries[chunk] * queries[chunk]).sum(dim=1).sum(dtype=torch.float64)
        grads = (grad_image_BE, grad_text_BE, grad_image_GE, grad_text_GE)
        ctx.grads = [*(grad.mul_(scale * weight) for grad in grads), (by_scale * weight).to(scale.dtype).view_as(scale)]
        return (loss * weight).to(image_BE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not ctx.grads:
            raise RuntimeError("the gradient of the loss was taken before; it is kept for one time only")
        found, ctx.grads = ctx.grads, []
        return *(saved.mul_(grad) for saved in found), None, None, None


def info_nce(
    image_BE: Tensor,
    text_BE: Tensor,
    image_GE: Tensor,
    text_GE: Tensor,
    scale: Tensor,
    *,
    first_row: int = 0,
    chunk_rows: int = 1024,
    valid_G: Tensor | None = None,
) -> Tensor:
    """InfoNCE of this rank's rows against the whole batch, both directions; its mean over ranks is the global loss.

    image_BE, text_BE: fp32 unit rows of this rank, which are rows first_row … first_row+B-1 of image_GE, text_GE;
    scale: exp(logit_scale) [1]; valid_G: bool, False leaves a pair out as row and as column (a hole).
    Memory beside the inputs: 4 (chunk_rows * G + 2 (B + G) E) bytes, one chunk of logits and the gradients, which the
    backward pass hands out; so it can run once. Logits are fp32, sums over rows fp64.
    Source: arXiv 2103.00020, figure 3.
    """
    assert image_BE.dtype == torch.float32, "the loss is computed in fp32"
    return _ChunkedInfoNCE.apply(
        image_BE, text_BE, image_GE, text_GE, scale, valid_G, first_row, min(chunk_rows, image_BE.shape[0])
    )
