"""A model as evaluations see it: images and texts in, one row each out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cmpt.data.eval_sets import EvalImages
from cmpt.data.tokenizer import Tokenizer, pack_captions
from cmpt.data.validate import DataError
from cmpt.dist.process_group import gather_objects
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.recipe.schema import Image, Masking


class Encoder:
    """All ranks call it together; every rank gets every row, fp32 on the host, in the order of what was given.

    Work is cut into parts that do not depend on the number of ranks, so neither does any bit of a row (with as many
    threads to a rank). Where ranks have unequally many parts, those without one compute on a sample of no one's: at
    ZeRO stage 3 all take part in each pass. Images keep all their patches.
    """

    beat: Callable[[], None] = staticmethod(lambda: None)
    """Called by every rank after each part: a sign of life for whoever watches."""

    def __init__(
        self,
        clip: CLIP,
        tokenizer: Tokenizer,
        image: Image,
        patch_size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.clip, self.tokenizer, self.image_size = clip, tokenizer, image.size
        self.batch_size, self.rank, self.world_size, self.device = batch_size, rank, world_size, device
        self._everything = MaskStage(Masking(strategy="none"), image, patch_size, seed=0)

    def images(self, images: EvalImages, *, tower: bool = False) -> Tensor:
        """Unit rows [N, E]; with `tower`, on rank 0 alone, what the tower gives to its projection [N, D].

        Raises DataError, on all ranks alike, where an image cannot be read: a set is evaluated whole or not at all.
        """
        out = torch.empty(0)
        for batch in images.batches(self.rank, self.world_size, self.batch_size, self.image_size):
            own = (batch.indices_B, self.pixels(batch.images_BCHW, tower=tower), batch.faults)
            views = gather_objects(own)
            faults = [fault for _, _, faults in views for fault in faults]
            if faults:
                raise DataError(faults[0])
            for indices_B, rows, _ in views:
                finite(rows)
                if not tower or self.rank == 0:
                    out = out if len(out) else torch.empty(len(images), rows.shape[1])
                    out[indices_B] = rows
            self.beat()
        return out

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit rows [M, E]."""
        out, step = torch.empty(0), self.world_size * self.batch_size
        for start in range(0, len(texts), step):
            first = start + self.rank * self.batch_size
            views = gather_objects(self.captions(texts[first : first + self.batch_size]))
            out = out if len(out) else torch.empty(len(texts), views[0].shape[1])
            out[start : start + step] = torch.cat(views)
            self.beat()
        return finite(out)

    @torch.no_grad()
    def pixels(self, images_BCHW: Tensor, *, tower: bool = False) -> Tensor:
        """This rank's own uint8 images, none included: [B, E], or with `tower` [B, D]."""
        size = len(images_BCHW)
        shown = images_BCHW if size else images_BCHW.new_zeros(1, 3, self.image_size, self.image_size)
        shown = shown.to(self.device)
        masked = self._everything(shown, torch.arange(len(shown), device=self.device))
        before: list[Tensor] = []
        with _at_rest(self.clip):
            hook = self.clip.visual.proj.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
            try:
                image_BE = self.clip.encode_image(masked.patches, len(shown))
            finally:
                hook.remove()
        if not tower:
            return image_BE[:size].cpu()
        order_B = masked.patches.order_B
        return before[0].new_empty(before[0].shape).index_copy(0, order_B, before[0])[:size].float().cpu()

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """This rank's own texts, none included: [M, E]."""
        packed = pack_captions([self.tokenizer.encode(text) for text in texts or [""]])
        with _at_rest(self.clip):
            text_ME = self.clip.encode_text(packed.to(self.device), max(1, len(texts)))
        return text_ME[: len(texts)].cpu()


def finite(rows: Tensor) -> Tensor:
    """The rows. Raises DataError where one is not finite: comparisons with NaN would count as right or as wrong."""
    if not rows.isfinite().all():
        raise DataError("the model's embeddings are not finite (NaN or infinity)")
    return rows


@contextmanager
def _at_rest(clip: CLIP) -> Iterator[None]:
    training = clip.training
    clip.eval()
    try:
        yield
    finally:
        clip.train(training)
