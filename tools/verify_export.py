"""Does open_clip compute from an exported folder what cmpt computes from the checkpoint? Used by tools/export.py.

The cmpt side never reads the folder's configuration, so an error there cannot be on both sides. Weights are rounded as
they were stored. Both towers get the same pixels; the two ways to make pixels of an image file are compared apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from cmpt.data.heldout import HeldoutSet
from cmpt.data.tokenizer import open_tokenizer, pack_captions
from cmpt.data.validate import DataError, UnusableError
from cmpt.engine.opened import OpenedModel
from cmpt.masking.strategies import MaskStage
from cmpt.models.clip import CLIP
from cmpt.models.open_clip_format import from_open_clip, halved
from cmpt.models.pretrained import WEIGHTS_FILE
from cmpt.recipe.schema import Masking, Recipe
from evaluate import EMBEDDED
from with_open_clip import import_open_clip

FEATURES = 1e-5  # largest difference of a feature vector relative to its length
LOGITS = 1e-5  # ... of a logit relative to the largest; both sides are fp32
PIXELS = 1.0  # mean absolute difference of preprocessed pixels, of 255: the resizes round differently
# Besides the captions of the set: what tokenizers stumble over.
ODD_CAPTIONS = [
    "",
    " ",
    "a photo of a cat, " * 60,
    "two dogs 🐶🐶 and a 👨‍👩‍👧 under a 🇫🇷 flag",
    "一只猫坐在窗台上，看着外面的雨",
    "AT&amp;T &lt;b&gt;sign&lt;/b&gt; &quot;open&quot;",
    "naïve café – “quoted” … ½",
    "ÜBER STRASSE İstanbul",
    "tabs\tand\nlines",
    "schÃ¶n mojibake",
    "12345 6.789 #tag @name http://a.b/c?d=e",
]


@dataclass(frozen=True)
class Check:
    name: str
    largest: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.largest <= self.bound  # a NaN does not


def verify_export(opened: OpenedModel, folder: Path, images: int, captions: int) -> bool:
    """Print one line per check and return whether all hold. Raises ModuleNotFoundError without open_clip."""
    open_clip = import_open_clip()
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    their_tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    heldout = heldout_set(opened.recipe)
    texts = captions_of(heldout, captions)
    checks = list(run_checks(opened, folder, theirs, their_tokenizer, preprocess, heldout, images, texts))
    for check in checks:
        print(f"{'ok  ' if check.holds else 'FAIL'} {check.name}: {check.largest:.3g}, allowed {check.bound:g}")
    failed = [check.name for check in checks if not check.holds]
    print(f"open_clip {open_clip.__version__} " + (f"does NOT confirm {folder}: {', '.join(failed)}" if failed else
          f"confirms {folder}: {min(images, len(heldout))} images, {len(texts)} captions"))  # fmt: skip
    return not failed


@torch.no_grad()
def run_checks(
    opened: OpenedModel,
    folder: Path,
    theirs: Any,
    their_tokenizer: Any,
    preprocess: Any,
    heldout: HeldoutSet,
    images: int,
    texts: list[str],
) -> Iterator[Check]:
    recipe = opened.recipe
    clip = rounded_as_stored(opened, folder).eval()
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    ids = [tokenizer.encode(text) for text in texts]
    their_ids = their_tokenizer(texts)
    wrong = [row for row, own in enumerate(ids) if their_ids[row, : len(own)].tolist() != own]
    if wrong:
        print(f"first caption with other ids: {texts[wrong[0]]!r}")
        print(f"  cmpt {ids[wrong[0]]}\n  open_clip {their_ids[wrong[0]].tolist()}")
    yield Check("captions with other token ids", len(wrong), 0)

    # The captions of the images, and the odd ones.
    rows = [*range(min(images, len(texts) - len(ODD_CAPTIONS))), *range(len(texts) - len(ODD_CAPTIONS), len(texts))]
    packed = pack_captions([ids[row] for row in rows])
    ours_text = torch.empty(len(rows), recipe.model.embed_dim or 0)
    ours_text[packed.order_B] = clip.text(packed, torch.float32)
    theirs_text = torch.cat([theirs.encode_text(part) for part in their_ids[rows].split(16)])
    yield Check("text features, relative", relative(ours_text, theirs_text), FEATURES)

    pixels_BCHW, apart = pixels_of(heldout, min(images, len(heldout)), preprocess, recipe)
    assert recipe.model.patch_size
    everything = MaskStage(Masking(strategy="none"), recipe.image, recipe.model.patch_size, seed=0)
    patches = everything(pixels_BCHW, torch.arange(len(pixels_BCHW))).patches
    ours_image = torch.empty(len(pixels_BCHW), recipe.model.embed_dim or 0)
    ours_image[patches.order_B] = clip.visual(patches, torch.float32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.image.mean, recipe.image.std))
    floats = (pixels_BCHW / 255 - mean) / std
    theirs_image = torch.cat([theirs.encode_image(part) for part in floats.split(8)])
    yield Check("image features, relative", relative(ours_image, theirs_image), FEATURES)

    ours_logits = clip.scale() * F.normalize(ours_image, dim=-1) @ F.normalize(ours_text, dim=-1).T
    theirs_logits = theirs.logit_scale.exp() * F.normalize(theirs_image, dim=-1) @ F.normalize(theirs_text, dim=-1).T
    for ours_logit, logits in ((clip.logit_bias, ours_logits), (theirs.logit_bias, theirs_logits)):
        if ours_logit is not None:
            logits += ours_logit
    apart_logits = float((ours_logits - theirs_logits).abs().max())
    yield Check("logits, relative to the largest", apart_logits / float(theirs_logits.abs().max()), LOGITS)
    yield Check("images that rank the captions otherwise", ranked_otherwise(ours_logits, theirs_logits), 0)
    if apart is None:
        print("none  preprocessing: no image that both sides decode alike (RGB, upright) to compare with")
    else:
        yield Check("preprocessing, mean difference of 255", apart, PIXELS)


def rounded_as_stored(opened: OpenedModel, folder: Path) -> CLIP:
    """The checkpoint's weights in the precision of the folder's file, as fp32."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        half = file.get_slice("visual.proj").get_dtype() == "F16"
    if not half:
        return opened.clip
    model, size = opened.recipe.model, opened.recipe.image.size
    clip = CLIP(model, size)
    clip.load_state_dict(from_open_clip(halved(opened.weights()), model, size))
    return clip


def relative(ours_BE: Tensor, theirs_BE: Tensor) -> float:
    return float(((ours_BE - theirs_BE).norm(dim=-1) / theirs_BE.norm(dim=-1)).max())


def ranked_otherwise(ours: Tensor, theirs: Tensor) -> int:
    """Images with two captions in another order that rounding does not explain."""
    rounding = 2 * LOGITS * float(theirs.abs().max())
    ordered = theirs.gather(1, ours.argsort(dim=1, descending=True))  # falls, if the order is the same
    return int((ordered.diff(dim=1) > rounding).any(dim=1).sum())


def heldout_set(recipe: Recipe) -> HeldoutSet:
    """The run's own held-out pairs; the embedded ones where it has none, or where they are not on this machine."""
    if recipe.data.heldout:
        try:
            return HeldoutSet(recipe.data.heldout, recipe.data, recipe.image)
        except (DataError, OSError) as error:
            print(f"data.heldout cannot be read ({error}); taking the embedded pairs")
    return HeldoutSet(EMBEDDED.heldout, EMBEDDED, recipe.image)


def captions_of(heldout: HeldoutSet, count: int) -> list[str]:
    """Captions of the first pairs, then all further captions of each, then the odd ones; `count` in all at most."""
    firsts: list[str] = []
    others: list[str] = []
    for batch in heldout.batches(0, 1, 64):
        firsts += batch.captions
        others += [caption for captions in batch.all_captions for caption in captions[1:]]
        if len(firsts) >= count:
            break
    return [*(firsts + others)[: max(1, count - len(ODD_CAPTIONS))], *ODD_CAPTIONS]


def pixels_of(heldout: HeldoutSet, count: int, preprocess: Any, recipe: Recipe) -> tuple[Tensor, float | None]:
    """cmpt's view of the first images, uint8, and how far open_clip's own view is from it on average.

    The latter is None where no image is RGB and upright: what is transparent is white in cmpt, while open_clip drops
    the alpha channel and does not turn images.
    """
    views: list[Tensor] = []
    apart: list[float] = []
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.image.mean, recipe.image.std))
    for index in range(len(heldout)):
        if len(views) == count:
            break
        try:
            pixels = torch.from_numpy(np.ascontiguousarray(heldout.pixels(index)))
        except UnusableError:  # passed the checks, and the decoder refuses it
            continue
        views.append(pixels)
        with PIL.Image.open(heldout.image_file(index)) as image:
            if image.mode == "RGB" and not image.getexif():
                apart.append(float(((preprocess(image) * std + mean) * 255 - pixels).abs().mean()))
    if not views:
        raise DataError(f"data.heldout: none of {len(heldout)} images can be decoded")
    return torch.stack(views), sum(apart) / len(apart) if apart else None
