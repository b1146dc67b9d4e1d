from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bench_loss
from cmpt.losses.contrastive import info_nce

ALLOCATOR_BYTES = 12 * 2**20  # what a process keeps beside its tensors


def features(rows: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor([14.3], requires_grad=True)


def plain(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients(loss: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 24, 1024])
def test_chunked_loss_and_gradients_equal_the_whole_matrix_in_float64(chunk_rows: int) -> None:
    inputs = features(24)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    ours = info_nce(inputs[0], inputs[1], inputs[0], inputs[1], inputs[2], chunk_rows=chunk_rows)
    expected = plain(*doubles)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-6)
    for found, wanted in zip(gradients(ours, inputs), gradients(expected, doubles), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_mean_over_ranks_is_the_global_loss_and_its_gradient(world: int) -> None:
    image, text, scale = features(24)
    rows = 24 // world
    losses = [
        info_nce(
            image[r * rows : (r + 1) * rows], text[r * rows : (r + 1) * rows], image, text, scale, first_row=r * rows
        )
        for r in range(world)
    ]
    total = torch.stack(losses).mean()
    expected = plain(image, text, scale)
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(
        gradients(total, (image, text, scale)), gradients(expected, (image, text, scale)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_holes_are_left_out_as_rows_and_as_columns(world: int) -> None:
    image, text, scale = features(24)
    valid = torch.ones(24, dtype=torch.bool)
    valid[[3, 10, 11]] = False
    rows = 24 // world
    losses = []
    for r in range(world):
        own = slice(r * rows, (r + 1) * rows)
        losses.append(info_nce(image[own], text[own], image, text, scale, first_row=r * rows, valid_G=valid))
    total = torch.stack(losses).mean()
    expected = plain(image[valid], text[valid], scale)
    torch.testing.assert_close(total, expected)
    for found, wanted in zip(
        gradients(total, (image, text, scale)), gradients(expected, (image, text, scale)), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_low_precision_features_are_refused() -> None:
    image, text, scale = (x.bfloat16() for x in features(4))
    with pytest.raises(AssertionError, match="fp32"):
        info_nce(image, text, image, text, scale)


def test_peak_memory_is_one_chunk_of_logits_and_the_gradients() -> None:
    rows, width, chunk_rows = 8192, 64, 512
    _, peak_bytes = bench_loss.measure("infonce", "chunked", rows, width, chunk_rows)
    expected = 4 * (chunk_rows * rows + 4 * rows * width)
    assert peak_bytes < 1.25 * expected + ALLOCATOR_BYTES
    assert peak_bytes < 4 * rows * rows / 4  # of one whole matrix


def test_a_second_backward_pass_is_refused() -> None:
    image, text, scale = features(8)
    loss = info_nce(image, text, image, text, scale)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one time only"):
        loss.backward()
