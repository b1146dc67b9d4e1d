from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cmpt.masking.fixed import gaussian
from cmpt.masking.strategies import MaskStage, masking_at
from cmpt.recipe import RecipeError
from cmpt.recipe.schema import Image, Masking

FIXED = [
    Masking(strategy="random"),
    Masking(strategy="centred"),
    Masking(strategy="block"),
    Masking(strategy="block", block="drop"),
    Masking(strategy="grid", ratio=0.75),
    Masking(strategy="scores", scores="masking.test_strategies:edges"),
]
ALL = [*FIXED, Masking(strategy="cluster", threshold=0.7), Masking(strategy="none")]


def name(masking: Masking) -> str:
    return f"{masking.strategy}-{masking.block}" if masking.strategy == "block" else masking.strategy


def images(count: int = 12, height: int = 48, width: int = 48) -> Tensor:
    """Smooth colour fields with some texture: patches that are alike, but not all."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    fine = torch.rand(count, 3, height, width, generator=generator) * 60
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 0.8 + fine).clamp(0, 255).to(torch.uint8)


def edges(images_BCHW: Tensor, patch_size: int, ordinal_B: Tensor) -> Tensor:
    """A user's own scores: how much changes from pixel to pixel within a patch."""
    change_B1HW = images_BCHW.float().diff(dim=3, append=images_BCHW[..., -1:].float()).abs().mean(1, keepdim=True)
    return torch.nn.functional.avg_pool2d(change_B1HW, patch_size).flatten(1)


def stage(masking: Masking, seed: int = 7) -> MaskStage:
    return MaskStage(masking, Image(size=48), 8, seed)


@pytest.mark.parametrize("masking", ALL, ids=name)
def test_a_sample_has_the_same_mask_in_any_batch(masking: Masking) -> None:
    pixels, ordinals = images(), torch.arange(100, 112)
    together = stage(masking)(pixels, ordinals).keep_BL
    halves = [stage(masking)(pixels[i::2], ordinals[i::2]).keep_BL for i in (0, 1)]
    assert torch.equal(together[0::2], halves[0])
    assert torch.equal(together[1::2], halves[1])


@pytest.mark.parametrize("masking", [m for m in ALL if m.strategy not in ("none", "scores")], ids=name)
def test_masks_change_with_ordinal_and_seed(masking: Masking) -> None:
    same = images(1).expand(12, -1, -1, -1)
    first = stage(masking)(same, torch.arange(12)).keep_BL
    assert len({tuple(row) for row in first.tolist()}) >= (12 if masking.strategy != "block" else 6)
    other_seed = stage(masking, seed=8)(same, torch.arange(12)).keep_BL
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 72), (104, 56), (8, 64)])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("masking", [m for m in FIXED if m.strategy != "grid"], ids=name)
def test_a_fixed_ratio_is_exact_for_every_image(masking: Masking, ratio: float, height: int, width: int) -> None:
    masking = replace(masking, ratio=ratio)
    patches = height * width // 64
    kept = max(1, math.floor(patches * (1 - ratio) + 1e-6))
    masked = stage(masking)(images(12, height, width), torch.arange(12))
    assert masked.patches.lengths == [kept] * 12
    assert masked.keep_BL.sum(1).tolist() == [kept] * 12


def places(masking: Masking, count: int, rows: int, columns: int) -> Tensor:
    """Keep masks of many images of one colour, [count, rows, columns]."""
    pixels = torch.zeros(1, 3, rows * 8, columns * 8, dtype=torch.uint8).expand(count, -1, -1, -1)
    return stage(masking)(pixels, torch.arange(count)).keep_BL.unflatten(1, (rows, columns))


def test_random_keeps_every_position_equally_often() -> None:
    kept = places(Masking(strategy="random", ratio=0.75), 4000, 5, 8).sum(0).flatten().double()
    expected = 4000 * 10 / 40
    # 39 degrees of freedom: 72 is passed once in a thousand; drawn without replacement counts vary less.
    assert float(((kept - expected) ** 2 / expected).sum()) * 39 / 30 < 72


def test_centred_keeps_the_middle_more_often_and_as_often_as_its_definition_says() -> None:
    """Against draws of numpy's generator by the formula of GLIP, section 3.2."""
    rows, columns, images_seen = 6, 9, 4000
    kept = places(Masking(strategy="centred", ratio=0.5), images_seen, rows, columns).sum(0).flatten() / images_seen
    y, x = [2 * r / (rows - 1) - 1 for r in range(rows)], [2 * c / (columns - 1) - 1 for c in range(columns)]
    density = [math.exp(-(a * a + b * b) / 0.4) / (0.4 * math.pi) for a in y for b in x]
    torch.testing.assert_close(gaussian(rows, columns), torch.tensor(density, dtype=torch.float64))
    draws = torch.rand(40_000, rows * columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = (draws - (1 - torch.tensor(density, dtype=torch.float64))).argsort(1, descending=True)[:, :27]
    expected = best.flatten().bincount(minlength=54) / 40_000
    assert (kept - expected).abs().max() < 0.035  # four standard errors
    assert kept[22] > 0.8 > 0.4 > kept[0]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("rows", "columns", "ratio"), [(6, 6, 0.5), (7, 9, 0.7), (12, 12, 0.4), (1, 8, 0.5)])
def test_block_is_one_rectangle_but_for_its_last_column(rows: int, columns: int, ratio: float, dropped: bool) -> None:
    masking = Masking(strategy="block", ratio=ratio, block="drop" if dropped else "keep")
    shapes: Counter[tuple[int, int]] = Counter()
    corners = set()
    for keep_RC in places(masking, 600, rows, columns):
        inside = (~keep_RC if dropped else keep_RC).nonzero()
        (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
        height, width = bottom - top + 1, right - left + 1
        box = {(y, x) for y in range(top, bottom + 1) for x in range(left, right + 1)}
        missing = sorted(box - {tuple(place) for place in inside.tolist()})
        assert missing == [(y, right) for y in range(bottom - len(missing) + 1, bottom + 1)]
        shapes[height, width] += 1
        corners.add((top, left))
    assert len(corners) > 3
    if min(rows, columns) > 1:
        assert len(shapes) > 1 and all(max(shape) <= 2 * min(shape) for shape in shapes)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (7, 9), (1, 5)])
def test_grid_keeps_one_patch_of_every_cell_each_equally_often(rows: int, columns: int) -> None:
    keep = places(Masking(strategy="grid", ratio=0.75), 2000, rows, columns)
    for y in range(0, rows, 2):
        for x in range(0, columns, 2):
            cell = keep[:, y : y + 2, x : x + 2].flatten(1)
            assert (cell.sum(1) == 1).all()
            share = cell.double().mean(0)
            assert (share - 1 / cell.shape[1]).abs().max() < 0.05


def test_scores_of_a_users_own_function_decide() -> None:
    pixels = images()
    keep = stage(FIXED[-1])(pixels, torch.arange(12)).keep_BL
    scores = edges(pixels, 8, torch.arange(12))
    for row in range(12):
        assert keep[row].sum() == 18 and scores[row][keep[row]].min() >= scores[row][~keep[row]].max()


def flat(images_BCHW: Tensor, patch_size: int, ordinal_B: Tensor) -> Tensor:
    """The left half of the image scores, evenly; the first patch has no score at all."""
    scores = (torch.arange(36) % 6 < 3).repeat(len(ordinal_B), 1).float()
    scores[:, 0] = torch.nan
    return scores


def test_among_equal_scores_it_is_drawn_who_stays_and_nan_goes_first() -> None:
    masking = Masking(strategy="scores", scores="masking.test_strategies:flat", ratio=0.75)
    kept = stage(masking)(torch.zeros(2000, 3, 48, 48, dtype=torch.uint8), torch.arange(2000)).keep_BL
    share = kept.double().mean(0).unflatten(0, (6, 6))
    assert share[0, 0] == 0 and (share[:, 3:] == 0).all()
    others = share[:, :3].flatten()[1:]
    assert (others - 9 / 17).abs().max() < 0.05


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("no_such_module:f", 'masking.scores = "no_such_module:f": cannot be imported: No module named'),
        ("masking.test_strategies:nothing", "cannot be imported: module .* has no attribute 'nothing'"),
        ("masking.test_strategies:FIXED", "must be a function, it is a list"),
        ("masking.test_strategies:wrong_shape", r"expected a tensor of shape \(12, 36\), got shape \(12, 35\)"),
        ("builtins:print", r"expected a tensor of shape \(12, 36\), got NoneType"),
    ],
)
def test_what_is_no_function_of_scores_is_told(function: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        stage(Masking(strategy="scores", scores=function))(images(), torch.arange(12))


def wrong_shape(images_BCHW: Tensor, patch_size: int, ordinal_B: Tensor) -> Tensor:
    return torch.zeros(12, 35)


@pytest.mark.parametrize("masking", ALL, ids=name)
def test_holes_keep_nothing_and_are_not_packed(masking: Masking) -> None:
    valid = torch.ones(12, dtype=torch.bool)
    valid[[2, 9]] = False
    whole = stage(masking)(images(), torch.arange(12))
    holed = stage(masking)(images(), torch.arange(12), valid)
    assert not holed.keep_BL[~valid].any()
    assert torch.equal(holed.keep_BL[valid], whole.keep_BL[valid])
    assert sorted(holed.patches.order_B.tolist()) == [b for b in range(12) if valid[b]]


def test_a_schedule_is_linear_over_the_phase() -> None:
    masking = Masking(ratio=0.6, ratio_end=0.4, min_ratio=0.3, min_ratio_end=0.1, embedding_share_end=1.0)
    quarter = masking_at(masking, 0.25)
    found = (quarter.ratio, quarter.min_ratio, quarter.anchor_ratio, quarter.embedding_share)
    assert found == pytest.approx((0.55, 0.25, 0.03, 0.25))
    for progress, kept in ((0.0, 18), (0.5, 22), (1.0, 27)):
        scheduled = stage(Masking(strategy="random", ratio=0.5, ratio_end=0.25))
        assert scheduled(images(), torch.arange(12), progress=progress).patches.lengths == [kept] * 12


def test_embeddings_and_pixels_are_mixed_by_their_share() -> None:
    """Against both similarities put together by hand; the embedding is told the grid."""
    weight = torch.randn(192, 10, generator=torch.Generator().manual_seed(3))
    place = torch.randn(54, 10, generator=torch.Generator().manual_seed(4))

    def embed(patches_BLP: Tensor, grid: tuple[int, int]) -> Tensor:
        assert grid == (6, 9)
        return patches_BLP @ weight + place

    pixels = images(4, 48, 72)
    found = {}
    for share in (0.0, 0.4, 1.0):
        masking = Masking(embedding_share=share, threshold=0.5, min_ratio=0.0)
        mask = MaskStage(masking, Image(size=48), 8, seed=7, embed=embed)
        found[share] = mask(pixels, torch.arange(4)).keep_BL
    image = Image()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (image.mean, image.std))
    normalised = (pixels / 255 - mean) / std
    for b in range(4):
        patches = torch.stack(
            [normalised[b, :, y : y + 8, x : x + 8].flatten() for y in range(0, 48, 8) for x in range(0, 72, 8)]
        )
        colour = torch.corrcoef(patches)
        embedded = patches @ weight + place
        meaning = torch.nn.functional.cosine_similarity(embedded[:, None], embedded[None], dim=-1)
        anchors = set(range(54))  # 3 % of 54 is one anchor: the same explains all three masks
        for share, keep in found.items():
            both = (1 - share) * colour + share * meaning
            anchors &= {a for a in range(54) if torch.equal(~keep[b], (both[a] > 0.5) | (torch.arange(54) == a))}
        assert anchors


def test_embeddings_need_a_model() -> None:
    with pytest.raises(ValueError, match="masking.embedding_share: must be 0 where no model"):
        stage(Masking(embedding_share=0.5))(images(), torch.arange(12))


def test_unknown_strategy_names_field_and_choices() -> None:
    with pytest.raises(ValueError, match=r"masking.strategy='checkers' must be one of cluster, none, random, centred"):
        stage(Masking(strategy="checkers"))
