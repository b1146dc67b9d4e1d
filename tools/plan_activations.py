"""How much memory a pass through the towers takes, counted on torch's meta device: no data, no weights, no GPU.

The model itself runs, forward and backward, on tensors without contents, while a dispatch mode adds up the storages
that are alive, as an allocator would see them. What a kernel takes inside of itself for a while is not seen, nor is
what an allocator loses to rounding and fragmentation. Sizes cost no time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmpt.batch import PackedPatches, PackedText
from cmpt.losses.contrastive import info_nce
from cmpt.losses.sigmoid import sigmoid_loss
from cmpt.models.clip import CLIP
from cmpt.models.transformer import LayerNorm
from cmpt.ops import attention
from cmpt.recipe.schema import Loss, Model

Parts = Mapping[str, float]
"""Bytes by what they are for."""
CASTS, IMAGE, TEXT, LOSS, BACKWARD = "weights in low precision", "image tower", "text tower", "loss", "backward pass"
ACTIVATIONS = (CASTS, IMAGE, TEXT, LOSS, BACKWARD)
_META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made under it and are still alive, and their most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.label = IMAGE
        self.now: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._casts_of: set[int] = set()

    def watch_casts(self, parameters: Iterator[Tensor]) -> None:
        """Copies of these in another dtype are CASTS."""
        self._casts_of = {parameter.untyped_storage()._cdata for parameter in parameters}

    def restart(self) -> dict[str, float]:
        """The peak until now; from here on a new one counts."""
        peak, self.peak = self.peak, dict(self.now)
        return peak

    def forget(self, tensor: Tensor) -> None:
        """It is somebody else's from now on."""
        self._end(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        label = self.label
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._casts_of:
            label = CASTS
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._begin(tensor, label)
        return result

    def _begin(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._casts_of:
            return
        self._alive[key] = (weakref.ref(storage, lambda _: self._end(key)), label, size)
        self.now[label] = self.now.get(label, 0) + size
        if total(self.now) > total(self.peak):
            self.peak = dict(self.now)

    def _end(self, key: int) -> None:
        if key in self._alive:
            _, label, size = self._alive.pop(key)
            self.now[label] -= size


@dataclass(frozen=True)
class Interval:
    """Of the backward pass: from the gradient before to this one."""

    parameter: str
    elements: int
    peak: Parts
    """With the gradient that is being made, without those that are done."""
    live: Parts
    """When the gradient is done, without it."""


@dataclass(frozen=True)
class Passes:
    """What a forward and a backward pass of both towers hold at a time, without parameters and finished gradients."""

    forward: Parts
    """At its most, before the loss."""
    end: Parts
    """When the forward pass is over: what the backward pass needs."""
    backward: Sequence[Interval]
    """In the order in which the gradients come."""


def total(parts: Parts) -> float:
    return sum(parts.values())


def added(*several: Parts) -> dict[str, float]:
    summed: dict[str, float] = {}
    for parts in several:
        for name, size in parts.items():
            summed[name] = summed.get(name, 0) + size
    return summed


def meta_model(model: Model, image_size: int, dtype: torch.dtype, flash: bool) -> CLIP:
    """The model without contents. `flash`: with the LayerNorm of CUDA, which works in fp32."""
    with torch.device(_META):
        clip = CLIP(model, image_size)
    clip.compute_dtype = dtype
    if flash:
        for module in clip.modules():
            if isinstance(module, LayerNorm):
                module.__class__ = _WideLayerNorm
    return clip


def packed(
    model: Model, image_lengths: Sequence[int], text_lengths: Sequence[int], grid: tuple[int, int], dtype: torch.dtype
) -> tuple[PackedPatches, PackedText]:
    """A batch without contents, of so many kept patches per image and tokens per caption."""
    assert model.patch_size

    def integers(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=_META)

    kept, words = sum(image_lengths), sum(text_lengths)
    patches_TP = torch.empty(kept, 3 * model.patch_size**2, dtype=dtype, device=_META)
    images = PackedPatches(patches_TP, integers(kept), list(image_lengths), integers(len(image_lengths)), grid)
    return images, PackedText(integers(words), integers(words), list(text_lengths), integers(len(text_lengths)))


def tower_passes(clip: CLIP, images: PackedPatches, text: PackedText, flash: bool) -> Passes:
    """One pass through both towers. `flash`: attention as a GPU does it, which keeps no weights; else as a CPU does."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in clip.named_parameters()}
    live = LiveBytes()
    intervals: list[Interval] = []
    live.watch_casts(iter(names))
    for parameter in names:
        parameter.grad = None

    def came(parameter: Tensor) -> None:
        assert parameter.grad is not None
        peak = live.restart()
        live.forget(parameter.grad)
        intervals.append(Interval(names[parameter], parameter.numel(), peak, dict(live.now)))
        live.restart()

    hooks = [parameter.register_post_accumulate_grad_hook(came) for parameter in names]
    for tower, label in ((clip.visual, IMAGE), (clip.text, TEXT)):
        hooks.append(tower.register_forward_pre_hook(lambda *_, label=label: setattr(live, "label", label)))
    try:
        with _attention(flash), live:
            outputs = clip(images, text, len(text.lengths))
            forward, end = live.restart(), dict(live.now)
            live.label = BACKWARD
            seeds = [torch.empty_like(output) for output in outputs if output is not None]
            torch.autograd.backward([output for output in outputs if output is not None], seeds)
    finally:
        for hook in hooks:
            hook.remove()
    return Passes(forward, end, intervals)


def scaled_passes(one: Passes, other: Passes, counts: tuple[int, int], pairs: int) -> Passes:
    """Of so many pairs, on the line through two counts."""
    low, high = counts

    def between(a: Parts, b: Parts) -> dict[str, float]:
        slopes = {name: (b.get(name, 0) - a.get(name, 0)) / (high - low) for name in {**a, **b}}
        return {name: max(0.0, a.get(name, 0) + slope * (pairs - low)) for name, slope in slopes.items()}

    backward = [
        replace(a, peak=between(a.peak, b.peak), live=between(a.live, b.live))
        for a, b in zip(one.backward, other.backward, strict=True)
    ]
    return Passes(between(one.forward, other.forward), between(one.end, other.end), backward)


def loss_bytes(loss: Loss, rows: int, embed_dim: int, world_size: int) -> float:
    """The most that the loss of a rank's rows and its gradient take, the gathered features included."""
    features = torch.empty(2, rows, embed_dim, device=_META, requires_grad=True)
    scale = torch.empty(1, device=_META, requires_grad=True)
    live = LiveBytes()
    with live:
        image_BE, text_BE = (features * 1).unbind(0)
        live.forget(image_BE)  # the towers' own output
        how: dict[str, Any] = {"chunk_rows": loss.chunk_rows}
        gather: Callable[[Tensor], Tensor] = lambda x: x if world_size == 1 else _Gather.apply(x, world_size)  # noqa: E731
        if loss.kind == "sigmoid":
            value = sigmoid_loss(image_BE, gather(text_BE), scale, torch.empty_like(scale).requires_grad_(), **how)
        else:
            both_GE = gather(torch.cat([image_BE, text_BE], dim=1))
            image_GE, text_GE = both_GE.chunk(2, dim=1)
            value = info_nce(image_BE, text_BE, image_GE, text_GE, scale, **how)
            del both_GE, image_GE, text_GE
        value.backward()
    return total(live.peak)


class _Gather(torch.autograd.Function):
    """Memory of cmpt.dist.process_group.gather_with_gradient with a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, local_BE: Tensor, world_size: int) -> Tensor:
        ctx.rows = len(local_BE)
        return local_BE.new_empty(world_size * len(local_BE), *local_BE.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous().new_empty(ctx.rows, *grads[0].shape[1:]), None


class _WideLayerNorm(LayerNorm):
    """What LayerNorm does where x is on CUDA: the fp32 copy of its input is kept for the backward pass."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if x_TD.dtype == self.weight.dtype:
            return super().forward(x_TD)
        return super().forward(x_TD.to(self.weight.dtype)).to(x_TD.dtype)


class _FlashAttention(torch.autograd.Function):
    """Memory of flash attention: queries, keys, values, the result and a sum per token and head stay; going back, an
    fp32 sum of the queries' gradient (FlashAttention-2, arXiv 2307.08691, section 3.1.2)."""

    @staticmethod
    def forward(ctx: Any, query_TNH: Tensor, key_TNH: Tensor, value_TNH: Tensor) -> Tensor:
        tokens, heads, _ = query_TNH.shape
        out_TNH = query_TNH.new_empty(query_TNH.shape)
        ctx.save_for_backward(
            query_TNH, key_TNH, value_TNH, out_TNH, query_TNH.new_empty(heads, tokens, dtype=torch.float32)
        )
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query_TNH, *_, sums_NT = ctx.saved_tensors
        work = (query_TNH.new_empty(query_TNH.shape, dtype=torch.float32), torch.empty_like(sums_NT))
        query, key, value = (query_TNH.new_empty(query_TNH.shape) for _ in range(3))
        del work
        return query, key, value


def _flash(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda qkv_T3NH: _FlashAttention.apply(*qkv_T3NH.unbind(1))


@contextmanager
def _attention(flash: bool) -> Iterator[None]:
    """The meta device gets what any device without CUDA gets; with `flash`, the stand-in."""
    kept = attention.BACKENDS["products"]
    if flash:
        attention.BACKENDS["products"] = _flash
    try:
        yield
    finally:
        attention.BACKENDS["products"] = kept
