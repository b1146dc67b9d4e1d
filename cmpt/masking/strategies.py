"""Which patches to hide: the stage between uint8 images and the vision tower, with one interface for every strategy.

A strategy gives a keep mask, bool [B, L], True for what the vision tower will see. Its randomness is keyed by each
sample's ordinal in the run, so the mask of a sample is the same at any world size, in every pass over the batch, and
after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmpt.batch import PackedPatches
from cmpt.masking.cluster import (
    anchor_count,
    anchor_similarities,
    draw_anchors,
    keep_by_similarity,
    least_hidden,
    nearest_anchor_similarity,
)
from cmpt.masking.fixed import FIXED_STRATEGIES, kept_of
from cmpt.masking.patches import Pixels, pack, standardise
from cmpt.masking.pixels import pixel_similarity
from cmpt.masking.threshold import ThresholdController
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe.schema import Image, Masking

Embed = Callable[[Tensor, tuple[int, int]], Tensor]
"""Standardised patches [B, L, P] and their grid (rows, columns) -> detached embeddings [B, L, D]."""


def masking_at(masking: Masking, progress: float) -> Masking:
    """The settings at a point of the phase, 0 its first step and 1 its last: every `..._end` is taken into account."""

    def at(start: float, end: float | None) -> float:
        return start if end is None else start + (end - start) * progress

    return replace(
        masking,
        ratio=at(masking.ratio, masking.ratio_end),
        ratio_end=None,
        anchor_ratio=at(masking.anchor_ratio, masking.anchor_ratio_end),
        anchor_ratio_end=None,
        min_ratio=at(masking.min_ratio, masking.min_ratio_end),
        min_ratio_end=None,
        embedding_share=at(masking.embedding_share, masking.embedding_share_end),
        embedding_share_end=None,
    )


def most_kept(masking: Masking, grid: tuple[int, int]) -> int:
    """The most patches that a strategy can leave of an image of so many rows and columns, at any point of the phase."""
    patches, ends = grid[0] * grid[1], [masking_at(masking, 0.0), masking_at(masking, 1.0)]
    if masking.strategy == "none":
        return patches
    if masking.strategy == "cluster":
        least = min(least_hidden(patches, m.min_ratio) for m in ends)
        return max(1, patches - max(least, min(anchor_count(m, patches) for m in ends)))
    if masking.strategy == "grid":  # a cell at an odd edge has fewer than four patches
        return -(-grid[0] // 2) * -(-grid[1] // 2)
    return max(kept_of(patches, m.ratio) for m in ends)


@dataclass(frozen=True)
class Masked:
    """A batch after masking."""

    patches: PackedPatches
    keep_BL: Tensor  # bool; rows of holes keep nothing
    threshold: float | None  # cluster: the similarity threshold that was used


class MaskStage:
    """uint8 images -> packed, normalised patches of what a strategy keeps, for one phase of a run.

    Holds the threshold controller: `advance(ratio)` follows the mean mask ratio of the global batch, which only the
    caller knows; `state` / `load_state` carry it through a checkpoint. `embed` is needed where a recipe compares
    embeddings. On CUDA the kernels of masking/fused.py do the work, on a stream of their own, and the patches come in
    `dtype`; `fused` forces these kernels, or plain torch.
    """

    def __init__(
        self,
        masking: Masking,
        image: Image,
        patch_size: int,
        seed: int,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
        embed: Embed | None = None,
        dtype: torch.dtype = torch.float32,
        fused: bool | None = None,
    ) -> None:
        if masking.strategy not in ("cluster", *FIXED_STRATEGIES):
            names = ", ".join(("cluster", *FIXED_STRATEGIES))
            raise ValueError(f"masking.strategy={masking.strategy!r} must be one of {names}")
        self.masking, self.image, self.patch_size, self.seed = masking, image, patch_size, seed
        self.sum_over_ranks, self.embed, self.dtype, self.fused = sum_over_ranks, embed, dtype, fused
        self.clusters = masking.strategy == "cluster"
        self.control = ThresholdController(masking.ratio, masking.min_ratio, masking.threshold)
        self.controls = self.clusters and masking.threshold is None
        self._stream: torch.cuda.Stream | None = None
        self._progress = 0.0  # of the last batch

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next batch can be masked before this one's step: not by weights that the step changes, and not
        while batches settle the threshold, which a checkpoint of this step must not have in it."""
        by_weights = any((self.masking.embedding_share, self.masking.embedding_share_end))
        return not (self.clusters and by_weights) and not (self.controls and self.control.settling)

    def __call__(
        self, images_BCHW: Tensor, ordinal_B: Tensor, valid_B: Tensor | None = None, progress: float = 0.0
    ) -> Masked:
        """Rows that are not valid (holes) keep nothing and are not packed. `progress`: of the phase, 0 … 1."""
        return self.begin(images_BCHW, ordinal_B, valid_B, progress)()

    def begin(
        self, images_BCHW: Tensor, ordinal_B: Tensor, valid_B: Tensor | None = None, progress: float = 0.0
    ) -> Callable[[], Masked]:
        """Starts to mask a batch; what it returns ends it. In between, CUDA does it beside what else it does.

        The threshold is that of now: `advance` for the batch before comes first.
        """
        masking, self._progress = masking_at(self.masking, progress), progress
        pixels = Pixels(images_BCHW, self.patch_size)
        if self.fused or (self.fused is None and images_BCHW.is_cuda):
            return self._begin_fused(pixels, ordinal_B, valid_B, masking)
        keep_BL = self._keep(pixels, ordinal_B, valid_B, masking)
        packed = pack(pixels.patches_BLP, keep_BL, pixels.grid)
        packed = replace(packed, patches_TP=standardise(packed.patches_TP, self.image.mean, self.image.std))
        masked = Masked(packed, keep_BL, self.control.threshold if self.clusters else None)
        return lambda: masked

    def _keep(self, pixels: Pixels, ordinal_B: Tensor, valid_B: Tensor | None, masking: Masking) -> Tensor:
        if self.clusters:
            words_BL = random_words_tensor(self.seed, ordinal_B, Purpose.ANCHORS, pixels.patches)
            anchors_BK = draw_anchors(words_BL, anchor_count(masking, pixels.patches))
            similarity_BL = self.similarity(pixels, anchors_BK, masking)
            threshold = self._threshold(similarity_BL, valid_B, masking)
            words_BL = random_words_tensor(self.seed, ordinal_B, Purpose.EXTRA_DROPS, pixels.patches)
            keep_BL = keep_by_similarity(similarity_BL, words_BL, threshold, masking.min_ratio)
        else:
            keep_BL = FIXED_STRATEGIES[masking.strategy](pixels, ordinal_B, masking, self.seed)
        return keep_BL if valid_B is None else keep_BL & valid_B[:, None]

    def similarity(self, pixels: Pixels, anchors_BK: Tensor, masking: Masking) -> Tensor:
        """Of every patch to the anchor most like it, float32 [B, L]; `masking` is that of `masking_at`."""
        mean, std, alike = self.image.mean, self.image.std, masking.constant_patches == "alike"
        centred, share = masking.normalise_patches, masking.embedding_share
        if share == 0:
            return pixel_similarity(pixels.patches_BLP, anchors_BK, mean, std, centred, alike)
        if self.embed is None:
            raise ValueError("masking.embedding_share: must be 0 where no model's embeddings are at hand")
        patches_BLP = standardise(pixels.patches_BLP, mean, std)
        embeddings_BLD = self.embed(patches_BLP, pixels.grid)
        similarity_BLK = share * anchor_similarities(embeddings_BLD, anchors_BK, centred=False, constant_alike=alike)
        if share < 1:
            similarity_BLK += (1 - share) * anchor_similarities(patches_BLP, anchors_BK, centred, alike)
        return nearest_anchor_similarity(similarity_BLK, anchors_BK)

    def _threshold(self, similarity_BL: Tensor, valid_B: Tensor | None, masking: Masking) -> float:
        """The controller's for this batch; the first batches settle it, which waits for the device."""
        if self.controls:
            self.control.aim(masking.ratio, masking.min_ratio)
            if self.control.settling:
                similarity_BL = similarity_BL if valid_B is None else similarity_BL[valid_B]
                self.control.calibrate(similarity_BL, self.sum_over_ranks)
        assert self.control.threshold is not None
        return self.control.threshold

    def _begin_fused(
        self, pixels: Pixels, ordinal_B: Tensor, valid_B: Tensor | None, masking: Masking
    ) -> Callable[[], Masked]:
        from cmpt.masking import fused  # needs Triton, which a CPU does without

        images_BCHW, image, patches = pixels.images_BCHW, self.image, pixels.patches
        if images_BCHW.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(images_BCHW.device)
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self.clusters:
                anchors_BK = fused.draw_anchors(ordinal_B, self.seed, patches, anchor_count(masking, patches))
                if masking.embedding_share == 0:
                    settings = (masking.normalise_patches, masking.constant_patches == "alike")
                    similarity_BL = fused.anchor_similarity(
                        images_BCHW, anchors_BK, self.patch_size, image.mean, image.std, *settings
                    )
                else:
                    similarity_BL = self.similarity(pixels, anchors_BK.long(), masking)
                threshold = self._threshold(similarity_BL, valid_B, masking)
                keep_BL, kept_B = fused.keep_patches(
                    similarity_BL, ordinal_B, self.seed, threshold, masking.min_ratio, valid_B
                )
            else:
                threshold = None
                keep_BL = self._keep(pixels, ordinal_B, valid_B, masking)
                kept_B = keep_BL.sum(dim=1, dtype=torch.int32)
            capacity = len(ordinal_B) * most_kept(masking, pixels.grid)
            patches_TP, position_T, order_B = fused.gather_patches(
                images_BCHW, keep_BL, kept_B, self.patch_size, image.mean, image.std, capacity, self.dtype
            )
            kept_on_host_B = kept_B.to("cpu", non_blocking=True)  # arrives while the step before goes on
            done = stream.record_event() if stream is not None else None
        if stream is not None:
            for used in (images_BCHW, ordinal_B, *([] if valid_B is None else [valid_B])):
                used.record_stream(stream)

        def end() -> Masked:
            if stream is not None and done is not None:
                done.synchronize()
                current = torch.cuda.current_stream()
                current.wait_event(done)
                for made in (keep_BL, patches_TP, position_T, order_B):
                    made.record_stream(current)
            lengths = sorted((kept for kept in kept_on_host_B.tolist() if kept), reverse=True)
            total = sum(lengths)
            assert total <= capacity
            packed = PackedPatches(
                patches_TP[:total], position_T[:total], lengths, order_B[: len(lengths)], pixels.grid
            )
            return Masked(packed, keep_BL, threshold)

        return end

    def advance(self, ratio: float) -> None:
        """Follow the mean mask ratio of the global batch that was just masked."""
        if self.controls:
            self.control.update(ratio)

    def state(self) -> dict[str, float | None]:
        """For a checkpoint; `progress` says to a reader how far the schedules are."""
        return {**self.control.state(), "progress": self._progress}

    def load_state(self, state: dict[str, float | None]) -> None:
        self.control.load(state)
