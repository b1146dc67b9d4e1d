from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cmpt.ops.attention import _varlen, _xformers, attention_backend, packed_attention

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


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_is_alike_among_others_of_its_length_and_alone(causal: bool) -> None:
    """With one length for all, low precision is computed in itself: within what rounding explains."""
    qkv = torch.randn(4 * 60, 3, 2, 16).bfloat16()
    together = packed_attention(qkv, [60] * 4, causal).float()
    expected = per_sequence(qkv.double(), [60] * 4, causal)
    assert relative(together, expected) < 1e-2
    mixed = packed_attention(qkv, [60, 60, 60, 59, 1], causal)[:180]
    assert relative(mixed, expected[:180]) < 5e-3


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def test_backend_of_a_cpu_and_of_a_gpu_with_and_without_xformers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cmpt.ops.attention")
    for installed, dtype, expected in (
        (True, torch.bfloat16, "xformers"),
        (True, torch.float32, "xformers"),
        (False, torch.bfloat16, "varlen"),
        (False, torch.float32, "products"),
    ):
        attention_backend.cache_clear()
        spec = SimpleNamespace() if installed else None
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        caplog.clear()
        assert {attention_backend("cuda", dtype) for _ in range(3)} == {expected}
        assert len(caplog.records) == 1
        assert attention_backend("cpu", dtype) == "products"
    attention_backend.cache_clear()


def test_varlen_gets_the_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CUDA kernel does not run here: that what it is given means the same, by a stand-in that reads it as told."""
    lengths = [5, 3, 1]

    def stand_in(query, key, value, starts_q, starts_k, longest_q, longest_k, *, window_size=(-1, -1)):
        assert torch.equal(starts_q, starts_k) and longest_q == longest_k == 5 and starts_q.dtype == torch.int32
        parts = [slice(a, b) for a, b in zip(starts_q[:-1], starts_q[1:], strict=True)]
        qkv = torch.stack([query, key, value], dim=1)
        return torch.cat([per_sequence(qkv[p], [p.stop - p.start], window_size == (-1, 0)) for p in parts])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    qkv = torch.randn(9, 3, 2, 16)
    for causal in (False, True):
        attend = _varlen(tuple(lengths), causal, torch.device("cpu"))
        torch.testing.assert_close(attend(qkv), packed_attention(qkv, lengths, causal))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [_xformers, _varlen])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_gpu_backend_equals_per_sequence_loop(
    lengths: list[int], causal: bool, dtype: torch.dtype, backend: Callable[..., Callable[..., torch.Tensor]]
) -> None:
    if backend is _varlen and dtype == torch.float32:
        pytest.skip("varlen is for low precision")
    qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=dtype)
    ours, reference = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, expected = backend(tuple(lengths), causal, qkv.device)(ours), per_sequence(reference, lengths, causal)
    out.sum().backward()
    expected.sum().backward()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.grad.double(), reference.grad, atol=2 * tolerance, rtol=2 * tolerance)
