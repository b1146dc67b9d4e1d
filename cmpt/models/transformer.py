"""The pre-norm transformer block of CLIP over packed tokens, and the two layers it is made of.

Precision is decided by whoever feeds the tower: parameters may be fp32 or bf16, activations have the dtype of what
comes in, and every layer casts its weights to that dtype. So fp32 parameters with bf16 activations need no autocast,
and a sharded engine may hold bf16 parameters without a change here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmpt.ops.attention import packed_attention
from cmpt.recipe.schema import Tower


class Linear(nn.Linear):
    """nn.Linear that works in the dtype of its input."""

    def forward(self, x_TD: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.weight.to(x_TD.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that takes low-precision input with fp32 gain and bias and returns the input's dtype."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.is_cuda and x_TD.dtype != self.weight.dtype:  # the CUDA kernel refuses mixed dtypes, the CPU's does not
            normed = F.layer_norm(x_TD.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
            return normed.to(x_TD.dtype)
        return F.layer_norm(x_TD, self.normalized_shape, self.weight, self.bias, self.eps)


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        tokens, width = x_TD.shape
        qkv_T3NH = self.in_proj(x_TD).view(tokens, 3, self.heads, width // self.heads)
        return self.out_proj(packed_attention(qkv_T3NH, lengths, self.causal).view(tokens, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, causal: bool, quick: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.c_fc = Linear(width, int(width * mlp_ratio))
        self.c_proj = Linear(int(width * mlp_ratio), width)
        self.activation = quick_gelu if quick else F.gelu

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        x_TD = x_TD + self.attn(self.ln_1(x_TD), lengths)
        return x_TD + self.c_proj(self.activation(self.c_fc(self.ln_2(x_TD))))


class Transformer(nn.Module):
    """A stack of blocks over packed tokens [T, D]; `lengths` are the tokens of each sequence, on the host."""

    def __init__(self, tower: Tower, causal: bool, quick: bool, recompute: bool) -> None:
        super().__init__()
        assert tower.width and tower.layers and tower.heads
        width, heads = tower.width, tower.heads
        self.blocks = nn.ModuleList(Block(width, heads, tower.mlp_ratio, causal, quick) for _ in range(tower.layers))
        self.recompute = recompute

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, lengths, use_reentrant=False)
            else:
                x_TD = block(x_TD, lengths)
        return x_TD
