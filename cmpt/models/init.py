"""Initial weights, one table for both towers.

Source: OpenAI's CLIP (arXiv 2103.00020, released code): normal with the deviations below, zero biases, unit gains.
The vision tower uses the same table, so width and depth scale both alike.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from cmpt.recipe.schema import Model, Tower


def _deviations(width: int, layers: int) -> dict[str, float]:
    """Standard deviation by the end of the parameter's name; everything that is not here is a gain or a bias."""
    return {
        "token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "visual.positional_embedding": width**-0.5,
        "class_embedding": width**-0.5,
        "in_proj.weight": width**-0.5,
        "out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "c_fc.weight": (2 * width) ** -0.5,
        "c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "proj.weight": width**-0.5,
    }


def initialise(clip: nn.Module, model: Model, seed: int) -> None:
    """Fill every parameter of `clip` in place, as a function of the seed alone; a model on the meta device stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if parameter.is_meta:
                continue
            tower: Tower = model.vision if name.startswith("visual") else model.text
            assert tower.width and tower.layers
            table = _deviations(tower.width, tower.layers)
            # The default of the convolution that a patch embedding is (He et al. with a = sqrt 5).
            table["patch_embedding.weight"] = (3 * parameter.shape[-1]) ** -0.5
            deviation = next((d for end, d in table.items() if name.endswith(end)), None)
            if name == "logit_scale":
                parameter.fill_(math.log(1 / model.temperature_init))
            elif name == "logit_bias":
                assert model.logit_bias_init is not None
                parameter.fill_(model.logit_bias_init)
            elif name.endswith("gain"):
                assert tower.layer_scale_init is not None
                parameter.fill_(tower.layer_scale_init)
            elif deviation is not None:
                parameter.normal_(0.0, deviation, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
