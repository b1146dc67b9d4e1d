"""Attention over packed sequences: several sequences in one tensor, no padding, none sees another.

`PackedAttention` is made once per pass of a tower and used by all its blocks. Its backend is one of

    xformers  CUDA: memory-efficient attention with a block-diagonal mask, fp32 included
    varlen    CUDA without xformers, bf16 and fp16: torch.nn.attention.varlen, the same packed sequences
    products  everything else: plain batched matrix products over runs of equally long sequences, in fp32

Packing sorts sequences by length (masking/patches.py), so a batch has few runs, and one if all lengths are equal.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class PackedAttention:
    """Softmax attention within each of some packed sequences. With `causal`, a token sees itself and what is before."""

    def __init__(self, lengths: Sequence[int], causal: bool, like: Tensor) -> None:
        """`lengths`: tokens of each sequence, on the host. `like`: has the device and the dtype of what will come."""
        self.lengths = tuple(lengths)
        self.causal = causal
        backend = attention_backend(like.device.type, like.dtype)
        # A mask is made here, not once per block: making one copies the lengths to the device.
        self._attend = BACKENDS[backend if self.lengths else "products"](self.lengths, causal, like.device)

    def __call__(self, qkv_T3NH: Tensor) -> Tensor:
        """Queries, keys and values of all tokens [T, 3, heads, head width] -> [T, heads, head width], same dtype."""
        return self._attend(qkv_T3NH)


def packed_attention(qkv_T3NH: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """`PackedAttention` for a single use."""
    return PackedAttention(lengths, causal, qkv_T3NH)(qkv_T3NH)


@cache
def attention_backend(device_type: str, dtype: torch.dtype) -> str:
    """Which of the backends above this device and dtype get; said once in the log."""
    backend = "products"
    if device_type == "cuda":
        if importlib.util.find_spec("xformers") is not None:
            backend = "xformers"
        elif dtype in (torch.bfloat16, torch.float16):
            backend = "varlen"
    _log.info("packed attention on %s in %s: %s", device_type, dtype, backend)
    return backend


def _xformers(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    # Imported here: on a CPU the import only prints warnings, and the package is in the extra `gpu`.
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    mask_type = BlockDiagonalCausalMask if causal else BlockDiagonalMask
    mask = mask_type.from_seqlens(lengths, device=device)

    def attend(qkv_T3NH: Tensor) -> Tensor:
        query, key, value = qkv_T3NH.unsqueeze(0).unbind(2)
        return memory_efficient_attention(query, key, value, attn_bias=mask)[0]

    return attend


def _varlen(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.12 says causality by a window, releases before it by a flag.
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if windowed else {"is_causal": causal}
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)

    def attend(qkv_T3NH: Tensor) -> Tensor:
        query, key, value = qkv_T3NH.unbind(1)
        out_TNH = varlen_attn(query, key, value, starts, starts, longest, longest, **how)
        assert isinstance(out_TNH, Tensor)
        return out_TNH

    return attend


def _products(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda qkv_T3NH: _RunAttention.apply(qkv_T3NH, lengths, causal)


BACKENDS = {"xformers": _xformers, "varlen": _varlen, "products": _products}


def _runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """(tokens, number of sequences, their length) of every run of equally long neighbours."""
    start = 0
    for length, members in groupby(lengths):
        count = sum(1 for _ in members)
        yield slice(start, start + count * length), count, length
        start += count * length


class _RunAttention(torch.autograd.Function):
    """Attention by batched matrix products, one batch per run of equally long sequences.

    On two cores with bf16 matrix units, torch's fused CPU kernel takes 480 ms for the backward of 256 sequences of 73
    tokens and 3 heads in bf16; this takes a tenth of it. Where lengths differ it works in fp32, because then most
    runs are short, and a bf16 product costs 0.2 ms however small it is, an fp32 one 0.06 ms; with one length for all it
    works in the dtype that comes in (softmax in fp32), which halves the time. Operands are made contiguous once per
    run, for a strided one makes a product five times as slow. Memory: the attention weights, 4 bytes (2 with one length
    in bf16) * heads * the sum of length**2.
    """

    @staticmethod
    def forward(ctx: Any, qkv_T3NH: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
        heads, head_width = qkv_T3NH.shape[2:]
        out_TNH = qkv_T3NH.new_empty(qkv_T3NH.shape[0], heads, head_width)
        dtype = _product_dtype(qkv_T3NH, lengths)
        weights = []
        for tokens, count, length in _runs(lengths):
            query, key, value = _heads_first(qkv_T3NH[tokens], count, length, dtype)
            scores = _at_least_fp32(torch.bmm(query.mul_(head_width**-0.5), key.transpose(1, 2)))
            if causal:
                future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
                scores.masked_fill_(future, float("-inf"))
            weight = torch.softmax(scores, dim=-1).to(dtype)
            _tokens_first(out_TNH[tokens], count, length).copy_(_split_heads(torch.bmm(weight, value), count))
            weights.append(weight)
        ctx.save_for_backward(qkv_T3NH, *weights)
        ctx.lengths = lengths
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        qkv_T3NH, *weights = ctx.saved_tensors
        (grad_TNH,) = grads
        head_width = qkv_T3NH.shape[-1]
        dtype = _product_dtype(qkv_T3NH, ctx.lengths)
        grad_qkv_T3NH = torch.empty_like(qkv_T3NH)
        for (tokens, count, length), weight in zip(_runs(ctx.lengths), weights, strict=True):
            query, key, value = _heads_first(qkv_T3NH[tokens], count, length, dtype)
            grad = _contiguous(_tokens_first(grad_TNH[tokens], count, length), dtype).flatten(0, 1)
            grad_weight = torch.bmm(grad, value.transpose(1, 2))
            # Masked scores have weight 0 and so get gradient 0: the causal mask needs no second application.
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            parts = (
                torch.bmm(grad_scores, key).mul_(head_width**-0.5),
                torch.bmm(grad_scores.transpose(1, 2), query).mul_(head_width**-0.5),
                torch.bmm(weight.transpose(1, 2), grad),
            )
            for i, part in enumerate(parts):
                _tokens_first(grad_qkv_T3NH[tokens, i], count, length).copy_(_split_heads(part, count))
        return grad_qkv_T3NH, None, None


def _product_dtype(x: Tensor, lengths: tuple[int, ...]) -> torch.dtype:
    """Depends on no other sequence than its own, unless all are equally long: see `_RunAttention`."""
    return x.dtype if len(set(lengths)) == 1 else torch.promote_types(x.dtype, torch.float32)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _heads_first(qkv_T3NH: Tensor, count: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Contiguous copies [count * heads, length, head width] of queries, keys and values of one run."""
    run = qkv_T3NH.view(count, length, *qkv_T3NH.shape[1:]).permute(2, 0, 3, 1, 4)
    return _contiguous(run, dtype).flatten(1, 2).unbind(0)


def _tokens_first(x_TNH: Tensor, count: int, length: int) -> Tensor:
    """The tokens of one run as a view [count, heads, length, head width]."""
    return x_TNH.view(count, length, *x_TNH.shape[1:]).transpose(1, 2)


def _split_heads(x: Tensor, count: int) -> Tensor:
    return x.view(count, -1, *x.shape[1:])
