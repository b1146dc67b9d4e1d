"""Named model sizes: what `model.preset` fills in where the recipe leaves a `model.*` field null. Torch-free."""

from __future__ import annotations


def _size(patch_size: int, embed_dim: int, vision: tuple[int, int, int], text: tuple[int, int, int]) -> dict[str, int]:
    """Towers as (width, layers, heads); the result's keys are field names below `model`, with dots."""
    fields = {"patch_size": patch_size, "embed_dim": embed_dim}
    for tower, sizes in (("vision", vision), ("text", text)):
        fields |= {f"{tower}.{name}": size for name, size in zip(("width", "layers", "heads"), sizes, strict=True)}
    return fields


# The ViT sizes are those of open_clip's model configurations of the same names, so that exported weights load there.
PRESETS: dict[str, dict[str, int]] = {
    "tiny-8": _size(8, 256, vision=(192, 4, 3), text=(192, 2, 3)),
    "ViT-B-32": _size(32, 512, vision=(768, 12, 12), text=(512, 12, 8)),
    "ViT-B-16": _size(16, 512, vision=(768, 12, 12), text=(512, 12, 8)),
    "ViT-L-14": _size(14, 768, vision=(1024, 24, 16), text=(768, 12, 12)),
    "ViT-H-14": _size(14, 1024, vision=(1280, 32, 16), text=(1024, 24, 16)),
}
