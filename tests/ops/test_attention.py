from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmpt.ops.attention import packed_attention

LENGTHS = [[5, 5, 5], [9, 7, 7, 3, 1], [1], [73, 72, 72, 4]]


def per_sequence(qkv: torch.Tensor, lengths: list[int], causal: bool) -> torch.Tensor:
    out = []
    for part in qkv.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_packed_equals_per_sequence_loop(
    lengths: list[int], causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(sum(lengths), 2, 16, generator=generator, dtype=torch.float64)
    ours, reference = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = packed_attention(ours, lengths, causal), per_sequence(reference, lengths, causal)
    out.backward(grad.to(dtype))
    expected.backward(grad)
    assert ours.grad is not None and reference.grad is not None
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_another_sequence_changes_no_bit(causal: bool) -> None:
    lengths = [6, 6, 4, 4, 2]
    qkv = torch.randn(22, 3, 2, 16)
    perturbed = qkv.clone()
    perturbed[12:16] += 1.0
    before, after = packed_attention(qkv, lengths, causal), packed_attention(perturbed, lengths, causal)
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[16:], after[16:])
    assert not torch.equal(before[12:16], after[12:16])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_xformers_equals_per_sequence_loop(lengths: list[int], causal: bool) -> None:
    qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    ours, reference = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = packed_attention(ours, lengths, causal), per_sequence(reference, lengths, causal)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=5e-2, rtol=5e-2)
