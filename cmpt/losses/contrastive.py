"""The contrastive loss over the global batch, in chunks of rows: the logit matrix never exists as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ChunkedInfoNCE(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of rows; the backward pass only scales what forward found."""

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
        valid_B = None if valid_G is None else valid_G[first_row : first_row + rows]
        # The mean is over the valid rows of all ranks, times the world size, since ranks average their losses.
        pairs = image_GE.shape[0] if valid_G is None else max(1, int(valid_G.sum()))
        weight = (image_GE.shape[0] / rows) / (2 * pairs)
        loss = image_BE.new_zeros(())
        grads = [torch.zeros_like(t) for t in (image_BE, text_BE, image_GE, text_GE, scale)]
        grad_image_BE, grad_text_BE, grad_image_GE, grad_text_GE, grad_scale = grads
        directions = (
            (image_BE, text_GE, grad_image_BE, grad_text_GE),
            (text_BE, image_GE, grad_text_BE, grad_image_GE),
        )
        for queries, keys, grad_queries, grad_keys in directions:
            for start in range(0, rows, chunk_rows):
                chunk = slice(start, min(start + chunk_rows, rows))
                cosine = queries[chunk] @ keys.T
                logits = cosine * scale
                if valid_G is not None:
                    logits.masked_fill_(~valid_G, float("-inf"))
                own = torch.arange(first_row + chunk.start, first_row + chunk.stop, device=logits.device)[:, None]
                log_sum = logits.logsumexp(dim=1, keepdim=True)
                row_loss = log_sum - cosine.gather(1, own) * scale
                # d loss / d logits = softmax - one-hot, for every row at once.
                residual = logits.sub_(log_sum).exp_().scatter_add_(1, own, -torch.ones_like(log_sum))
                if valid_B is not None:
                    row_loss = row_loss[valid_B[chunk]]
                    residual = residual.masked_fill_(~valid_B[chunk, None], 0.0)
                residual.mul_(weight)
                loss += row_loss.sum() * weight
                grad_scale += (residual * cosine).sum()
                grad_queries[chunk] += residual @ keys * scale
                grad_keys += residual.T @ queries[chunk] * scale
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return *(saved * grad for saved in ctx.saved_tensors), None, None, None


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
    Memory: O(chunk_rows * G). The log-sum-exp is fp32.
    Source: arXiv 2103.00020, figure 3.
    """
    assert image_BE.dtype == torch.float32, "the loss is computed in fp32"
    return _ChunkedInfoNCE.apply(
        image_BE, text_BE, image_GE, text_GE, scale, valid_G, first_row, min(chunk_rows, image_BE.shape[0])
    )
