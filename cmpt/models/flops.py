"""Floating-point operations of a step, counted from the tokens that were really processed.

A multiply-add is two operations; matrix products only (norms, activations and softmax are left out, as is usual).
Attention counts length**2 per sequence for the vision tower and, for the causal text tower too: that is what the
published figures do and what the kernels mostly execute.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmpt.recipe.schema import Model, Tower


def tower_flops(tower: Tower, lengths: Sequence[int]) -> float:
    """Forward FLOPs of the blocks over packed sequences of these lengths (tokens, class token included)."""
    assert tower.width and tower.layers
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    hidden = int(tower.width * tower.mlp_ratio)
    weights = 4 * tower.width * tower.width + 2 * tower.width * hidden
    return 2.0 * tower.layers * (tokens * weights + 2 * squares * tower.width)


def recomputed_flops(tower: Tower, lengths: Sequence[int]) -> float:
    """FLOPs of running the blocks again in the backward pass, which stops at the last tensor that is needed.

    That is before the last product of a block, unless LayerScale needs its result.
    """
    assert tower.width and tower.layers
    last = 0 if tower.layer_scale_init is not None else tower.width * int(tower.width * tower.mlp_ratio)
    return tower_flops(tower, lengths) - 2.0 * tower.layers * sum(lengths) * last


def forward_flops(model: Model, image_lengths: Sequence[int], text_lengths: Sequence[int]) -> float:
    """Forward FLOPs of both towers. `image_lengths` are kept patches per image, without the class token."""
    assert model.patch_size and model.embed_dim and model.vision.width and model.text.width
    patch_values = 3 * model.patch_size**2
    image = tower_flops(model.vision, [length + 1 for length in image_lengths])
    image += 2.0 * sum(image_lengths) * patch_values * model.vision.width
    image += 2.0 * len(image_lengths) * model.vision.width * model.embed_dim
    text = tower_flops(model.text, text_lengths)
    text += 2.0 * len(text_lengths) * model.text.width * model.embed_dim
    return image + text


def training_flops(
    model: Model,
    image_lengths: Sequence[int],
    text_lengths: Sequence[int],
    global_batch: int,
    cached: bool = False,
) -> float:
    """FLOPs of one training step of these samples: forward, twice that backward, recomputed blocks, and the loss.

    `cached`: with gradient caching, which is one forward pass more.
    `global_batch`: columns of the logit matrix; each direction of the loss is one product forward, two backward.
    """
    assert model.embed_dim
    total = (4 if cached else 3) * forward_flops(model, image_lengths, text_lengths)
    if model.activation_checkpointing:
        total += recomputed_flops(model.vision, [n + 1 for n in image_lengths])
        total += recomputed_flops(model.text, text_lengths)
    kind = "infonce" if model.logit_bias_init is None else "sigmoid"
    return total + loss_flops(global_batch, len(text_lengths), model.embed_dim, kind)


def loss_flops(global_batch: int, rows: float, embed_dim: int, kind: str) -> float:
    """FLOPs of so many rows of logits, forward and backward; `kind` is "infonce", two directions, or "sigmoid", one."""
    return (2 if kind == "infonce" else 1) * 3 * 2.0 * rows * global_batch * embed_dim


# Dense bf16 peak in FLOP/s by a part of the device's name, the first that fits (NVIDIA data sheets).
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362.05e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """None for other devices, whose MFU is then unknown; H100 NVL and H200 NVL are among them."""
    if "NVL" in device_name:
        return None
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
