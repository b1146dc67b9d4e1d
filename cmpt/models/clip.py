"""The two towers, and the temperature and bias between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmpt.batch import PackedPatches, PackedText
from cmpt.models.init import initialise
from cmpt.models.text import TextTower
from cmpt.models.vision import VisionTower
from cmpt.recipe.schema import Model


class CLIP(nn.Module):
    """Packed images and packed captions -> normalised joint embeddings in batch order, and the logit scale.

    Source: Radford et al., arXiv 2103.00020. Parameters carry open_clip's meaning tensor by tensor.
    `compute_dtype` is the dtype of the activations; embeddings and the temperature are always fp32.
    """

    def __init__(self, model: Model, image_size: int, seed: int = 0) -> None:
        super().__init__()
        self.visual = VisionTower(model, image_size)
        self.text = TextTower(model)
        # Shape [1], not []: DeepSpeed cannot flatten a 0-dimensional parameter.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = None if model.logit_bias_init is None else nn.Parameter(torch.empty(1))
        self.logit_scale_max = math.log(model.logit_scale_max)
        self.compute_dtype = torch.float32
        initialise(self, model, seed)

    def forward(
        self, images: PackedPatches, text: PackedText, batch_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """-> image_BE, text_BE (fp32, unit length; zero rows where nothing was packed), scale and bias [1]."""
        bias = None if self.logit_bias is None else self.logit_bias.float()
        return self.encode_image(images, batch_size), self.encode_text(text, batch_size), self.scale(), bias

    def encode_image(self, images: PackedPatches, batch_size: int) -> Tensor:
        return _unpack(self.visual(images, self.compute_dtype), images.order_B, batch_size)

    def encode_text(self, text: PackedText, batch_size: int) -> Tensor:
        return _unpack(self.text(text, self.compute_dtype), text.order_B, batch_size)

    def scale(self) -> Tensor:
        return _Clamp.apply(self.logit_scale.float(), 0.0, self.logit_scale_max).exp()


def _unpack(features_BE: Tensor, order_B: Tensor, batch_size: int) -> Tensor:
    """Packed order -> batch order; normalised in fp32."""
    normed = F.normalize(features_BE.float(), dim=-1)
    return normed.new_zeros(batch_size, normed.shape[-1]).index_copy(0, order_B, normed)


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient passes at the bound if it points back inside.

    An ordinary clamp has no gradient outside, so a temperature that an optimizer step carried past its bound would
    stay there for ever; and clamping the parameter itself is undone by the optimizer's sharded master copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        low, high = ctx.bounds
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def parameter_groups(model: CLIP, by_layer: bool = False) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by tower and by whether weight decay applies: "visual.decay", "visual.no_decay", …, "temperature".

    No decay on vectors (gains, biases, the class token) and the temperature (CLIP, section 2.5);
    the bias of the logits is with the latter. `by_layer` splits towers by depth as well, "visual.3.decay": 0 is what
    lies before the blocks, then one for each block, then what follows them.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        tower = name.split(".")[0]
        if tower not in ("visual", "text"):
            groups.setdefault("temperature", {})[name] = parameter
            continue
        kind = "decay" if parameter.ndim > 1 else "no_decay"
        group = f"{tower}.{_depth(model, name)}.{kind}" if by_layer else f"{tower}.{kind}"
        groups.setdefault(group, {})[name] = parameter
    return groups


def _depth(model: CLIP, name: str) -> int:
    tower = model.visual if name.startswith("visual.") else model.text
    path = name.split(".")
    if path[1:3] == ["transformer", "blocks"]:
        return int(path[3]) + 1
    return len(tower.transformer.blocks) + 1 if path[1] in ("ln_post", "ln_final", "proj") else 0


def layer_rates(model: CLIP, vision_decay: float, text_decay: float) -> dict[str, float]:
    """For each group of `parameter_groups(model, by_layer=True)`, the share of the learning rate that it gets."""
    rates = {}
    for group in parameter_groups(model, by_layer=True):
        tower, _, rest = group.partition(".")
        if not rest:
            rates[group] = 1.0
            continue
        decay, blocks = (vision_decay, model.visual) if tower == "visual" else (text_decay, model.text)
        rates[group] = decay ** (len(blocks.transformer.blocks) + 1 - int(rest.split(".")[0]))
    return rates
