"""Equal embeddings score equally wherever they stand: in fp32 the last bit of a matrix product depends on the place."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from cmpt.evals.retrieval import match_ranks
from cmpt.evals.scores import on_grid
from cmpt.evals.zero_shot import zero_shot


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_inner_products_on_the_grid_have_one_value_whatever_the_order_of_the_sum() -> None:
    rows, columns = on_grid(unit(9, 512)), on_grid(unit(33, 512, seed=1))
    whole = rows @ columns.T
    one_by_one = torch.stack([torch.stack([(row * column).sum() for column in columns]) for row in rows])
    backwards = rows.flip(1) @ columns.flip(1).T
    integers = [[[int(value * 2**26) for value in row] for row in part.tolist()] for part in (rows, columns)]
    exact = [[sum(map(operator.mul, row, column)) for column in integers[1]] for row in integers[0]]
    assert torch.equal(whole, one_by_one) and torch.equal(whole, backwards)
    assert [[int(value * 2**52) for value in row] for row in whole.tolist()] == exact


def test_the_grid_is_finer_than_the_rounding_of_an_fp32_product_and_leaves_its_input_alone() -> None:
    rows, columns = unit(64, 512), unit(64, 512, seed=1)
    exact = rows.double() @ columns.double().T
    moved = (on_grid(rows) @ on_grid(columns).T - exact).abs().max()
    assert moved < ((rows @ columns.T).double() - exact).abs().max() and torch.equal(rows, unit(64, 512))
    whole = unit(3, 4).double()
    on_grid(whole)
    assert torch.equal(whole, unit(3, 4).double())


def test_equal_classes_are_never_told_apart() -> None:
    """One image and few classes, where fp32 differs most often."""
    for classes in range(2, 12):
        same = unit(1, 512, seed=classes).expand(classes, 512).contiguous()
        for seed in range(20):
            found = [zero_shot(unit(1, 512, seed=100 + seed), same, [label]) for label in range(classes)]
            assert {one["top1"] for one in found} == {0.0}
            assert {one["top5"] for one in found} == {1.0 if classes <= 5 else 0.0}


@pytest.mark.parametrize("images", [1, 7, 1025])  # 1,024 and one: a tile of one image
def test_equal_captions_and_equal_images_are_never_told_apart(images: int) -> None:
    one, owner_M = unit(1, 512, seed=5), torch.repeat_interleave(torch.arange(images), 5)
    same_NE, same_ME = one.expand(images, 512).contiguous(), one.expand(5 * images, 512).contiguous()
    assert set(match_ranks(unit(images, 512), same_ME, owner_M, 0, 1)[0].tolist()) == {5 * images - 5}
    assert set(match_ranks(same_NE, unit(5 * images, 512), owner_M, 0, 1)[1].tolist()) == {images - 1}
