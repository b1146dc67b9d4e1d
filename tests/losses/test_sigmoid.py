from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import bench_loss
from cmpt.losses.sigmoid import sigmoid_loss

ALLOCATOR_BYTES = 12 * 2**20  # what a process keeps beside its tensors

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs_of(rows: int, width: int = 16) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, width, generator=generator), dim=1) for _ in range(2))
    scale, bias = torch.tensor([10.0]), torch.tensor([-9.0])
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), bias.requires_grad_()


def plain(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's equation 1, written out."""
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def assert_equal(ours: torch.Tensor, expected: torch.Tensor, left: Inputs, right: Inputs) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), atol=1e-6, rtol=1e-6)
    gradients = zip(torch.autograd.grad(ours, left), torch.autograd.grad(expected, right), strict=True)
    for found, wanted in gradients:
        torch.testing.assert_close(found.double(), wanted.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 24, 1024])
def test_chunked_loss_and_gradients_equal_the_whole_matrix_in_float64(chunk_rows: int) -> None:
    inputs = inputs_of(24)
    image, text, scale, bias = (x.detach().double().requires_grad_() for x in inputs)
    ours = sigmoid_loss(*inputs, chunk_rows=chunk_rows)
    assert_equal(ours, plain(image, text, scale, bias), inputs, (image, text, scale, bias))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("holes", [[], [3, 10, 11]])
def test_mean_over_ranks_is_the_global_loss_of_the_valid_pairs_and_its_gradient(world: int, holes: list[int]) -> None:
    image, text, scale, bias = inputs = inputs_of(24)
    valid = torch.ones(24, dtype=torch.bool)
    valid[holes] = False
    rows = 24 // world
    losses = [
        sigmoid_loss(
            image[r * rows : (r + 1) * rows], text, scale, bias, first_row=r * rows, valid_G=valid if holes else None
        )
        for r in range(world)
    ]
    expected = plain(image[valid], text[valid], scale, bias)
    assert_equal(torch.stack(losses).mean(), expected, inputs, inputs)


def test_equals_open_clips_sigmoid_loss(open_clip: ModuleType) -> None:
    image, text, scale, bias = inputs_of(24)
    theirs = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias), theirs)


def test_extreme_logits_stay_finite() -> None:
    image, text, _, _ = inputs_of(8)
    loss = sigmoid_loss(image, text, torch.tensor([1e4]), torch.tensor([0.0]))
    assert torch.isfinite(loss)


def test_peak_memory_is_two_chunks_and_the_gradients() -> None:
    rows, width, chunk_rows = 8192, 64, 512
    _, peak_bytes = bench_loss.measure("sigmoid", "chunked", rows, width, chunk_rows)
    expected = 4 * (2 * chunk_rows * rows + 2 * rows * width)
    assert peak_bytes < 1.25 * expected + ALLOCATOR_BYTES
    assert peak_bytes < 4 * rows * rows / 4  # of one whole matrix


def test_a_second_backward_pass_is_refused() -> None:
    inputs = inputs_of(8)
    loss = sigmoid_loss(*inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one time only"):
        loss.backward()
