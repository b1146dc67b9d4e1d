"""What masking does to some images, computed with the code that training uses; `mask_page.py` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmpt.masking.cluster import anchor_count, draw_anchors
from cmpt.masking.patches import Pixels
from cmpt.masking.strategies import Embed, MaskStage
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe.schema import Image, Masking

STRATEGIES = ("cluster", "random", "centred", "block", "grid")
GRID_RATIO = 0.75  # what "grid" hides, whatever the recipe's ratio
NEARLY_WHITE = 8  # grey levels below 255 that still count as white paper


def is_background(pixels: Pixels) -> Tensor:
    """bool [B, L]: patches that are white, or nearly, throughout."""
    return pixels.patches_BLP.amin(dim=-1) >= 255 - NEARLY_WHITE


@dataclass(frozen=True)
class Settings:
    """What the masks depend on, besides the images."""

    masking: Masking  # at one point of the phase: no `..._end` is set
    image: Image
    patch_size: int
    seed: int
    ordinal: int
    embed: Embed | None = None

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image.size // self.patch_size

    @property
    def smaller_size(self) -> int:
        """Side in pixels of an image that has, to the nearest whole grid, the patches that the ratio leaves."""
        return max(1, round(self.grid * math.sqrt(1 - self.masking.ratio))) * self.patch_size

    @property
    def strategies(self) -> tuple[str, ...]:
        return (*STRATEGIES, "scores") if self.masking.scores else STRATEGIES

    def stage(self, strategy: str) -> MaskStage:
        """The masking of training with another strategy and otherwise the same settings.

        A recipe of another strategy need not keep `min_ratio` below `ratio`; then the smaller one counts.
        """
        masking = replace(self.masking, strategy=strategy)
        if strategy == "grid":
            masking.ratio = GRID_RATIO
        masking.min_ratio = min(masking.min_ratio, masking.ratio)
        return MaskStage(masking, self.image, self.patch_size, self.seed, embed=self.embed)


@dataclass(frozen=True)
class View:
    """One image; K anchors, the one with the largest cluster first, and L patches."""

    image_HWC: NDArray[np.uint8]
    anchors: list[int]  # their patches
    similarity_L: NDArray[np.float32]  # to the nearest anchor; of anchors themselves 2
    similarity_KL: NDArray[np.float32]  # to each anchor
    cluster_L: list[int]  # 0 … K-1, or -1: in no cluster
    keep: dict[str, NDArray[np.bool_]]  # by strategy, [L]
    background_L: NDArray[np.bool_]  # nothing in the patch but white, or nearly

    def cluster_size(self, k: int) -> int:
        return self.cluster_L.count(k)

    @property
    def extra_drops(self) -> int:
        """Patches that are hidden although no anchor is like them."""
        return int((~self.keep["cluster"] & (np.array(self.cluster_L) < 0)).sum())

    @property
    def background(self) -> float:
        """Share of the image that is white background."""
        return float(self.background_L.mean())

    def hidden_background(self, strategy: str) -> float | None:
        """Share of the hidden patches that are white background; None where nothing is hidden."""
        hidden_L = ~self.keep[strategy]
        return float(self.background_L[hidden_L].mean()) if hidden_L.any() else None


def look(images_BCHW: Tensor, settings: Settings) -> tuple[float, list[View]]:
    """The similarity threshold, and of each image (uint8) what is hidden.

    Where `settings.masking.threshold` is null, the threshold is what holds the mean over these images at the ratio.
    Every image gets the draws of the same ordinal, so that its picture is the same whatever the others are. Raises
    ValueError where a strategy cannot work with these settings.
    """
    ordinal_B = torch.full((len(images_BCHW),), settings.ordinal)
    cluster = settings.stage("cluster")
    masked = cluster(images_BCHW, ordinal_B)
    assert masked.threshold is not None
    keep = {"cluster": masked.keep_BL}
    for strategy in settings.strategies:
        if strategy != "cluster":
            keep[strategy] = settings.stage(strategy)(images_BCHW, ordinal_B).keep_BL

    pixels = Pixels(images_BCHW, settings.patch_size)
    words_BL = random_words_tensor(settings.seed, ordinal_B, Purpose.ANCHORS, pixels.patches)
    anchors_BK = draw_anchors(words_BL, anchor_count(cluster.masking, pixels.patches))
    similarity_BL = cluster.similarity(pixels, anchors_BK, cluster.masking)
    each = [cluster.similarity(pixels, anchor_B1, cluster.masking) for anchor_B1 in anchors_BK.split(1, dim=1)]
    similarity_BKL = torch.stack(each, dim=1)
    cluster_BL = torch.where(similarity_BL > masked.threshold, similarity_BKL.argmax(dim=1), -1)
    background_BL = is_background(pixels)
    views = []
    for b, anchors in enumerate(anchors_BK.tolist()):
        order, cluster_L = by_size(cluster_BL[b].tolist(), len(anchors))
        views.append(
            View(
                image_HWC=images_BCHW[b].permute(1, 2, 0).numpy(),
                anchors=[anchors[k] for k in order],
                similarity_L=similarity_BL[b].numpy(),
                similarity_KL=similarity_BKL[b, order].numpy(),
                cluster_L=cluster_L,
                keep={strategy: keep_BL[b].numpy() for strategy, keep_BL in keep.items()},
                background_L=background_BL[b].numpy(),
            )
        )
    return masked.threshold, views


def by_size(cluster_L: Sequence[int], clusters: int) -> tuple[list[int], list[int]]:
    """The clusters, largest first, and every patch's cluster by its place in that order; -1 stays."""
    order = sorted(range(clusters), key=lambda k: -cluster_L.count(k))
    place = {k: i for i, k in enumerate(order)} | {-1: -1}
    return order, [place[k] for k in cluster_L]
