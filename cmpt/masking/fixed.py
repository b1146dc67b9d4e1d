"""Strategies that hide as many patches of every image: the rivals of cluster masking, behind the same interface.

Each is a function of (pixels, ordinal_B, masking, seed) -> keep_BL, bool [B, L], that keeps exactly `kept_of(L, ratio)`
patches of every image ("grid": one of each cell, "none": all). Its randomness is keyed by the samples' ordinals.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from cmpt.masking.patches import Pixels
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe import RecipeError
from cmpt.recipe.schema import Masking

_VARIANCE = 0.2  # of GLIP's Gaussian, on the grid [-1, 1]²
_WORDS = 1 << 32


def kept_of(patches: int, ratio: float) -> int:
    """How many patches stay: int(L * (1 - ratio)), at least one; immune to rounding such as 0.7 * 10 = 6.9999."""
    return max(1, int(patches * (1 - ratio) + 1e-9))


def keep_highest(scores_BL: Tensor, kept: int) -> Tensor:
    """The `kept` patches of each image with the largest scores."""
    keep_BL = torch.zeros(scores_BL.shape, dtype=torch.bool, device=scores_BL.device)
    return keep_BL.scatter(1, scores_BL.topk(kept, dim=1).indices, True)


def keep_all(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """No masking: plain CLIP."""
    return torch.ones(len(ordinal_B), pixels.patches, dtype=torch.bool, device=ordinal_B.device)


def random(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """FLIP (arXiv 2212.00794, section 3.1): uniformly drawn patches stay."""
    return keep_highest(_words(pixels, ordinal_B, seed), kept_of(pixels.patches, masking.ratio))


def centred(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """GLIP (arXiv 2403.15837, section 3.2): the largest U - (1 - pdf) stay, pdf a Gaussian around the middle."""
    uniform_BL = _words(pixels, ordinal_B, seed).double() / _WORDS
    scores_BL = uniform_BL - (1 - gaussian(*pixels.grid).to(ordinal_B.device))
    return keep_highest(scores_BL, kept_of(pixels.patches, masking.ratio))


def gaussian(rows: int, columns: int) -> Tensor:
    """The density of GLIP's Gaussian at every patch, the outermost at -1 and 1: float64 [L]."""
    y_R, x_C = (torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1) for n in (rows, columns))
    squares_RC = y_R.square()[:, None] + x_C.square()[None, :]
    return (torch.exp(-squares_RC / (2 * _VARIANCE)) / (2 * math.pi * _VARIANCE)).flatten()


def block(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """A contiguous rectangle stays, or with `masking.block` = "drop" goes (CLIPA, arXiv 2305.07017, section 3.1).

    Its shape is uniform among those that are at most twice as long as wide, its place uniform in the image. Where the
    number of patches does not fill a rectangle, its last column is shorter.
    """
    rows, columns = pixels.grid
    kept = kept_of(pixels.patches, masking.ratio)
    area = kept if masking.block == "keep" else pixels.patches - kept
    if area == 0:
        return keep_all(pixels, ordinal_B, masking, seed)
    shapes_N2 = torch.tensor(_rectangles(rows, columns, area), device=ordinal_B.device)
    shape_B, top_B, left_B = random_words_tensor(seed, ordinal_B, Purpose.KEEP, 3).unbind(dim=1)
    height_B, width_B = shapes_N2[shape_B * len(shapes_N2) >> 32].unbind(dim=1)
    top_B, left_B = top_B * (rows - height_B + 1) >> 32, left_B * (columns - width_B + 1) >> 32
    row_L = torch.arange(rows, device=ordinal_B.device).repeat_interleave(columns)
    column_L = torch.arange(columns, device=ordinal_B.device).repeat(rows)
    y_BL, x_BL = row_L - top_B[:, None], column_L - left_B[:, None]
    inside_BL = (y_BL >= 0) & (y_BL < height_B[:, None]) & (x_BL >= 0) & (x_BL < width_B[:, None])
    full_B = height_B - (height_B * width_B - area)  # patches of the last column
    inside_BL &= (x_BL < width_B[:, None] - 1) | (y_BL < full_B[:, None])
    return inside_BL if masking.block == "keep" else ~inside_BL


@cache
def _rectangles(rows: int, columns: int, area: int) -> list[tuple[int, int]]:
    """(height, width) that just hold so many patches and fit: those with sides up to 1 : 2, or the squarest."""
    fitting = [(height, -(-area // height)) for height in range(1, rows + 1)]
    fitting = [(height, width) for height, width in fitting if width <= columns and height <= area]
    fair = [(height, width) for height, width in fitting if max(height, width) <= 2 * min(height, width)]
    return fair or [min(fitting, key=lambda sides: max(sides) / min(sides))]


def grid(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """One patch of every 2 x 2 stays, drawn uniformly (CLIPA, arXiv 2305.07017, section 3.1); cells at an odd edge are
    smaller."""
    rows, columns = pixels.grid
    words_BRC = _words(pixels, ordinal_B, seed).unflatten(1, (rows, columns))
    padded_BRC = torch.nn.functional.pad(words_BRC, (0, columns % 2, 0, rows % 2), value=-1)
    cells_BRC4 = padded_BRC.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)
    keep_BRC4 = torch.zeros(cells_BRC4.shape, dtype=torch.bool, device=ordinal_B.device)
    keep_BRC4.scatter_(3, cells_BRC4.argmax(dim=3, keepdim=True), True)
    keep_BRC = keep_BRC4.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return keep_BRC[:, :rows, :columns].flatten(1)


def scores(pixels: Pixels, ordinal_B: Tensor, masking: Masking, seed: int) -> Tensor:
    """What a function of the user's own scores highest stays, for example an attention map's patches."""
    given = score_function(masking.scores or "")(pixels.images_BCHW, pixels.patch_size, ordinal_B)
    expected = (len(ordinal_B), pixels.patches)
    if not isinstance(given, Tensor) or tuple(given.shape) != expected:
        found = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise RecipeError([f'masking.scores = "{masking.scores}": expected a tensor of shape {expected}, got {found}'])
    scores_BL = given.to(ordinal_B.device, torch.float32).nan_to_num(nan=-torch.inf)
    order_BL = _words(pixels, ordinal_B, seed).argsort(dim=1)  # who comes first among equal scores is drawn, too
    ranked_BL = scores_BL.gather(1, order_BL).argsort(dim=1, descending=True, stable=True)
    kept_BL = order_BL.gather(1, ranked_BL[:, : kept_of(pixels.patches, masking.ratio)])
    return torch.zeros(expected, dtype=torch.bool, device=ordinal_B.device).scatter(1, kept_BL, True)


@cache
def score_function(name: str) -> Callable[[Tensor, int, Tensor], Tensor]:
    """The function that `masking.scores` names; its module may lie in the current folder. Raises RecipeError."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # a module of the user's can fail in any way
        raise RecipeError([f'masking.scores = "{name}": cannot be imported: {error}']) from error
    if not callable(found):
        raise RecipeError([f'masking.scores = "{name}": must be a function, it is a {type(found).__name__}'])
    return found


def _words(pixels: Pixels, ordinal_B: Tensor, seed: int) -> Tensor:
    return random_words_tensor(seed, ordinal_B, Purpose.KEEP, pixels.patches)


FIXED_STRATEGIES = {
    "none": keep_all,
    "random": random,
    "centred": centred,
    "block": block,
    "grid": grid,
    "scores": scores,
}
