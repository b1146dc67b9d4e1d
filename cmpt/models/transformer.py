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

from cmpt.ops.attention import PackedAttention
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


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (arXiv 2103.17239, section 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD * self.gain.to(x_TD.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = Linear(width, 3 * width)
        self.out_proj = Linear(width, width)

    def forward(self, x_TD: Tensor, attend: PackedAttention) -> Tensor:
        tokens, width = x_TD.shape
        qkv_T3NH = self.in_proj(x_TD).view(tokens, 3, self.heads, width // self.heads)
        return self.out_proj(attend(qkv_T3NH).view(tokens, width))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with LayerScale, a gain on both branches."""

    def __init__(self, tower: Tower, quick: bool) -> None:
        super().__init__()
        assert tower.width and tower.heads
        width, hidden = tower.width, int(tower.width * tower.mlp_ratio)
        self.ln_1 = LayerNorm(width, tower.layer_norm_eps)
        self.attn = Attention(width, tower.heads)
        self.ls_1 = nn.Identity() if tower.layer_scale_init is None else LayerScale(width)
        self.ln_2 = LayerNorm(width, tower.layer_norm_eps)
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)
        self.ls_2 = nn.Identity() if tower.layer_scale_init is None else LayerScale(width)
        self.activation = quick_gelu if quick else F.gelu

    def forward(self, x_TD: Tensor, attend: PackedAttention) -> Tensor:
        x_TD = x_TD + self.ls_1(self.attn(self.ln_1(x_TD), attend))
        return x_TD + self.ls_2(self.c_proj(self.activation(self.c_fc(self.ln_2(x_TD)))))


class Transformer(nn.Module):
    """A stack of blocks over packed tokens [T, D]; `lengths` are the tokens of each sequence, on the host."""

    def __init__(self, tower: Tower, causal: bool, quick: bool, recompute: bool) -> None:
        super().__init__()
        assert tower.layers
        self.blocks = nn.ModuleList(Block(tower, quick) for _ in range(tower.layers))
        self.causal = causal
        self.recompute = recompute

    def forward(self, x_TD: Tensor, lengths: Sequence[int]) -> Tensor:
        attend = PackedAttention(lengths, self.causal, x_TD)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, attend, use_reentrant=False)
            else:
                x_TD = block(x_TD, attend)
        return x_TD
