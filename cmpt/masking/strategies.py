"""Which patches to hide: one interface for every strategy.

A strategy maps the patches of a batch to a keep mask, bool [B, L], True for what the vision tower will see. Its
randomness is keyed by each sample's ordinal in the run, so the mask of a sample is the same at any world size, in
every pass over the batch, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cmpt.batch import PackedPatches
from cmpt.masking.cluster import draw_anchors, keep_by_similarity, least_hidden, nearest_anchor_similarity
from cmpt.masking.patches import pack, patchify, standardise
from cmpt.masking.threshold import ThresholdController
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe.schema import Image, Masking


class Strategy(Protocol):
    def __call__(self, patches_BLP: Tensor, ordinal_B: Tensor) -> Tensor:
        """keep_BL from the CLIP-normalised patches and the ordinals of their samples."""
        ...


class KeepAll:
    """No masking: plain CLIP."""

    def __call__(self, patches_BLP: Tensor, ordinal_B: Tensor) -> Tensor:
        return torch.ones(patches_BLP.shape[:2], dtype=torch.bool, device=patches_BLP.device)


def _kept_of(patches: int, ratio: float) -> int:
    return max(1, int(patches * (1 - ratio) + 1e-9))


class Random:
    """FLIP (arXiv 2212.00794, section 3.1): int(L * (1 - ratio)) uniformly drawn patches stay, at least one."""

    def __init__(self, ratio: float, seed: int) -> None:
        self.ratio = ratio
        self.seed = seed

    def __call__(self, patches_BLP: Tensor, ordinal_B: Tensor) -> Tensor:
        batch, patches, _ = patches_BLP.shape
        words_BL = random_words_tensor(self.seed, ordinal_B, Purpose.KEEP, patches)
        kept = _kept_of(patches, self.ratio)
        keep_BL = torch.zeros(batch, patches, dtype=torch.bool, device=patches_BLP.device)
        return keep_BL.scatter(1, words_BL.topk(kept, dim=1).indices, True)


class Cluster:
    """Cluster masking (arXiv 2405.08815): see masking/cluster.py; the threshold is the controller's."""

    def __init__(
        self, masking: Masking, seed: int, control: ThresholdController, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        self.masking = masking
        self.seed = seed
        self.control = control
        self.sum_over_ranks = sum_over_ranks

    def __call__(self, patches_BLP: Tensor, ordinal_B: Tensor) -> Tensor:
        patches = patches_BLP.shape[1]
        anchors_BK = draw_anchors(
            random_words_tensor(self.seed, ordinal_B, Purpose.ANCHORS, patches), self.masking.anchor_ratio
        )
        similarity_BL = nearest_anchor_similarity(patches_BLP, anchors_BK)
        if self.control.threshold is None:
            self.control.calibrate(similarity_BL, self.sum_over_ranks)
        assert self.control.threshold is not None
        words_BL = random_words_tensor(self.seed, ordinal_B, Purpose.EXTRA_DROPS, patches)
        return keep_by_similarity(similarity_BL, words_BL, self.control.threshold, self.masking.min_ratio)


def most_kept(masking: Masking, patches: int) -> int:
    """The most patches that a strategy can leave of an image with so many."""
    if masking.strategy == "none":
        return patches
    if masking.strategy == "random":
        return _kept_of(patches, masking.ratio)
    return max(1, patches - least_hidden(patches, masking.min_ratio))


@dataclass(frozen=True)
class Masked:
    """A batch after masking."""

    patches: PackedPatches
    keep_BL: Tensor  # bool; rows of holes keep nothing
    threshold: float | None  # cluster: the similarity threshold that was used


class MaskStage:
    """uint8 images -> packed, normalised patches of what a strategy keeps.

    Holds the threshold controller: `advance(ratio)` follows the mean mask ratio of the global batch, which only the
    caller knows; `state` / `load_state` carry it through a checkpoint.
    """

    def __init__(
        self,
        masking: Masking,
        image: Image,
        patch_size: int,
        seed: int,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> None:
        self.image = image
        self.patch_size = patch_size
        self.control = ThresholdController(masking.ratio, masking.min_ratio, masking.threshold)
        self.controls = masking.strategy == "cluster" and masking.threshold is None
        self.strategy: Strategy
        if masking.strategy == "cluster":
            self.strategy = Cluster(masking, seed, self.control, sum_over_ranks)
        elif masking.strategy == "random":
            self.strategy = Random(masking.ratio, seed)
        elif masking.strategy == "none":
            self.strategy = KeepAll()
        else:
            raise ValueError(f'masking.strategy={masking.strategy!r} must be one of "cluster", "random", "none"')

    def __call__(self, images_BCHW: Tensor, ordinal_B: Tensor, valid_B: Tensor | None = None) -> Masked:
        """Rows that are not valid (holes) keep nothing and are not packed."""
        height, width = images_BCHW.shape[-2:]
        patches_BLP = standardise(patchify(images_BCHW, self.patch_size), self.image.mean, self.image.std)
        if valid_B is None or bool(valid_B.all()):
            keep_BL = self.strategy(patches_BLP, ordinal_B)
        else:
            keep_BL = torch.zeros(patches_BLP.shape[:2], dtype=torch.bool, device=images_BCHW.device)
            keep_BL[valid_B] = self.strategy(patches_BLP[valid_B], ordinal_B[valid_B])
        grid = (height // self.patch_size, width // self.patch_size)
        threshold = self.control.threshold if isinstance(self.strategy, Cluster) else None
        return Masked(pack(patches_BLP, keep_BL, grid), keep_BL, threshold)

    def advance(self, ratio: float) -> None:
        """Follow the mean mask ratio of the global batch that was just masked."""
        if self.controls:
            self.control.update(ratio)

    def state(self) -> dict[str, float | None]:
        return self.control.state()

    def load_state(self, state: dict[str, float | None]) -> None:
        self.control.load(state)
