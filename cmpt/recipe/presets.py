"""Named model sizes: what `model.preset` fills in where the recipe does not give a `model.*` field. Torch-free.

A ViT size that open_clip 3.3.0 has a configuration for is that configuration, text tower included, so that exported
weights load there under the same name. Only the position table depends on the image size, so open_clip's names that
end in one (ViT-L-14-336) are the size without it and `image.size`; those that end in -quickgelu are the same and
`model.quick_gelu=true`.
"""

from __future__ import annotations

from typing import Any


def _size(
    patch_size: int, embed_dim: int, vision: tuple[int, int, int], text: tuple[int, int, int], **more: Any
) -> dict[str, Any]:
    """Towers as (width, layers, heads); `more`: fields of the vision tower. The keys are field names below `model`."""
    fields: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim}
    for tower, sizes in (("vision", vision), ("text", text)):
        fields |= {f"{tower}.{name}": size for name, size in zip(("width", "layers", "heads"), sizes, strict=True)}
    return fields | {f"vision.{name}": value for name, value in more.items()}


# Text towers, by the vision tower that they are paired with.
_TI, _S, _M = (192, 12, 3), (384, 12, 6), (512, 12, 8)
_B, _B_PLUS, _L, _H = (512, 12, 8), (640, 12, 10), (768, 12, 12), (1024, 24, 16)

PRESETS: dict[str, dict[str, Any]] = {
    # For the quickstart and for trials; of nobody else's making.
    "tiny-8": _size(8, 256, vision=(192, 4, 3), text=(192, 2, 3)),
    # The Ti of DeiT (arXiv 2012.12877), with a text tower as wide as itself, as S has one.
    "ViT-Ti-16": _size(16, 192, vision=(192, 12, 3), text=_TI),
    "ViT-Ti-8": _size(8, 192, vision=(192, 12, 3), text=_TI),
    # open_clip has no B/8, S/8, S/14 and B/14: their towers are those of its B/16 and S/16.
    "ViT-S-8": _size(8, 384, vision=(384, 12, 6), text=_S),
    "ViT-S-14": _size(14, 384, vision=(384, 12, 6), text=_S),
    "ViT-S-16": _size(16, 384, vision=(384, 12, 6), text=_S),
    "ViT-S-32": _size(32, 384, vision=(384, 12, 6), text=_S),
    "ViT-S-16-alt": _size(16, 256, vision=(384, 12, 6), text=(256, 10, 4)),
    "ViT-S-32-alt": _size(32, 256, vision=(384, 12, 6), text=(256, 10, 4)),
    "ViT-M-16": _size(16, 512, vision=(512, 12, 8), text=_M),
    "ViT-M-32": _size(32, 512, vision=(512, 12, 8), text=_M),
    "ViT-M-16-alt": _size(16, 384, vision=(512, 12, 8), text=(384, 12, 6), layer_scale_init=1e-4),
    "ViT-M-32-alt": _size(32, 384, vision=(512, 12, 8), text=(384, 12, 6)),
    "ViT-B-8": _size(8, 512, vision=(768, 12, 12), text=_B),
    "ViT-B-14": _size(14, 512, vision=(768, 12, 12), text=_B),
    "ViT-B-16": _size(16, 512, vision=(768, 12, 12), text=_B),
    "ViT-B-32": _size(32, 512, vision=(768, 12, 12), text=_B),
    "ViT-B-16-plus": _size(16, 640, vision=(896, 12, 14), text=_B_PLUS),
    "ViT-B-32-plus": _size(32, 640, vision=(896, 12, 14), text=_B_PLUS),
    "ViT-L-14": _size(14, 768, vision=(1024, 24, 16), text=_L),
    "ViT-L-16": _size(16, 768, vision=(1024, 24, 16), text=_L),
    "ViT-H-14": _size(14, 1024, vision=(1280, 32, 16), text=_H),
    "ViT-H-16": _size(16, 1024, vision=(1280, 32, 16), text=_H),
    "ViT-g-14": _size(14, 1024, vision=(1408, 40, 16), text=_H, mlp_ratio=4.3637),
    "ViT-bigG-14": _size(14, 1280, vision=(1664, 48, 16), text=(1280, 32, 20), mlp_ratio=4.9231),
    "ViT-e-14": _size(14, 1280, vision=(1792, 56, 16), text=(1280, 36, 20), mlp_ratio=8.5715),
}
