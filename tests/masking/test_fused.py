"""The fused kernels against the readable way and a float64 reference: on a GPU, else by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from masking.photographs import flat_and_nearly, noise, photographs, reference_patches, reference_similarity
from torch import Tensor

from cmpt.masking import cluster
from cmpt.masking.patches import pack, patchify, standardise
from cmpt.masking.strategies import MaskStage
from cmpt.ops.random import Purpose, random_words_tensor
from cmpt.recipe.schema import Image, Masking

with pytest.MonkeyPatch.context() as environment:
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")  # read when triton is imported, and when a kernel first runs
    from cmpt.masking import fused

CLIP = Image()
EQUAL = Image(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])  # a white patch is constant only with such
ORDINALS = torch.tensor([0, 5, 2**33 + 7])
SEED = 11
# Height and width that give few patches, by patch size.
SIZES = {1: (4, 8), 2: (8, 12), 4: (16, 24), 8: (32, 48), 14: (56, 42), 16: (48, 80), 32: (64, 64)}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter takes tensors of the CPU, compiled kernels those of the GPU."""
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("a GPU is here: the kernels are compiled")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return str(request.param)


def words(purpose: Purpose, patches: int, ordinal_B: Tensor = ORDINALS) -> Tensor:
    return random_words_tensor(SEED, ordinal_B, purpose, patches)


def readable_similarity(images: Tensor, anchors_BK: Tensor, patch: int, image: Image, **how: bool) -> Tensor:
    patches_BLP = standardise(patchify(images, patch), image.mean, image.std)
    return cluster.nearest_anchor_similarity(cluster.anchor_similarities(patches_BLP, anchors_BK, **how), anchors_BK)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 3, 2**63 + 9])
def test_random_words_are_those_of_the_host_bit_for_bit(device: str, seed: int) -> None:
    for patches in (36, 196):
        found = fused.random_words(seed, ORDINALS.to(device), patches)
        assert torch.equal(found.cpu(), random_words_tensor(seed, ORDINALS, Purpose.ANCHORS, patches))


@pytest.mark.parametrize("patches", [36, 196, 256, 1024])
@pytest.mark.parametrize("anchors", [1, 5, 64])
def test_anchors_are_the_patches_of_the_largest_words(device: str, patches: int, anchors: int) -> None:
    anchors = min(anchors, patches - 1)
    found = fused.draw_anchors(ORDINALS.to(device), SEED, patches, anchors)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu().long(), cluster.draw_anchors(words(Purpose.ANCHORS, patches), anchors))


def assert_similarity(device: str, images: Tensor, patch: int, image: Image, anchors: int, **how: bool) -> None:
    patches = images.shape[2] * images.shape[3] // patch**2
    anchors_BK = cluster.draw_anchors(words(Purpose.ANCHORS, patches, torch.arange(len(images))), anchors)
    found = fused.anchor_similarity(
        images.to(device), anchors_BK.int().to(device), patch, image.mean, image.std, **how
    ).cpu()
    np.testing.assert_allclose(found, readable_similarity(images, anchors_BK, patch, image, **how), rtol=0, atol=2e-5)
    for b, pixels in enumerate(images.double().numpy()):
        expected = reference_similarity(
            reference_patches(pixels, patch, image),
            anchors_BK[b].tolist(),
            how.get("centred", True),
            how.get("constant_alike", True),
        )
        np.testing.assert_allclose(found[b], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch", SIZES)
@pytest.mark.parametrize("centred", [True, False])
def test_similarity_of_photographs_noise_and_flat_images(device: str, patch: int, centred: bool) -> None:
    height, width = SIZES[patch]
    images = torch.cat([photographs(height, width), noise(height, width)[:1], flat_and_nearly(height, width)])
    assert_similarity(device, images, patch, CLIP, 2, centred=centred)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_similarity_where_white_is_constant(device: str, centred: bool, alike: bool) -> None:
    images = flat_and_nearly(56, 42)
    images[1, :, :28] = 127  # rows of grey under rows of one colour: constant, or not, at several levels
    assert_similarity(device, images, 14, EQUAL, 2, centred=centred, constant_alike=alike)


def test_black_is_constant_for_the_cosine_where_it_is_zero(device: str) -> None:
    images = torch.cat([torch.zeros_like(noise(32, 32)), noise(32, 32)])
    images[0, :, 8:16] = 9
    zero_mean = Image(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    for alike in (True, False):
        assert_similarity(device, images, 8, zero_mean, 3, centred=False, constant_alike=alike)


@pytest.mark.parametrize("anchors", [1, 17, 64])
def test_similarity_with_few_and_with_many_anchors(device: str, anchors: int) -> None:
    """More than one program per image: 72 patches."""
    assert_similarity(device, photographs(64, 72)[:2], 8, CLIP, anchors)


def test_one_pixel_off_by_one_grey_level_is_compared_exactly(device: str) -> None:
    """Two patches, each flat but for one pixel: their correlation is -1 / (P - 1), or 1 where it is the same pixel."""
    for patch in (8, 32):
        images = torch.full((1, 3, patch, 3 * patch), 200, dtype=torch.uint8)
        images[0, 1, 3, 4] += 1
        images[0, 1, 3, 4 + patch] += 1
        images[0, 2, 5, 6 + 2 * patch] += 1
        anchors_BK = torch.tensor([[0]], dtype=torch.int32)
        found = fused.anchor_similarity(images.to(device), anchors_BK.to(device), patch, EQUAL.mean, EQUAL.std)
        expected = torch.tensor([cluster.ALWAYS_HIDDEN, 1.0, -1 / (3 * patch**2 - 1)])
        torch.testing.assert_close(found[0].cpu(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    ("threshold", "min_ratio"), [(0.5, 0.3), (0.9, 0.5), (0.95, 0.0), (3.0, 0.0), (-1.5, 0.3), (0.3, 0.99)]
)
def test_keep_masks_are_those_of_the_readable_way(device: str, threshold: float, min_ratio: float) -> None:
    for patches in (36, 196):
        similarity_BL = torch.rand(3, patches, generator=torch.Generator().manual_seed(patches))
        similarity_BL[1] = (similarity_BL[1] * 4).round() / 4  # ties, with each other and with thresholds
        expected = cluster.keep_by_similarity(similarity_BL, words(Purpose.EXTRA_DROPS, patches), threshold, min_ratio)
        given = similarity_BL.to(device), ORDINALS.to(device), SEED
        keep_BL, kept_B = fused.keep_patches(*given, threshold, min_ratio, None)
        assert keep_BL.dtype == torch.bool and kept_B.dtype == torch.int32
        assert torch.equal(keep_BL.cpu(), expected)
        assert torch.equal(kept_B.cpu().long(), expected.sum(dim=1))
        valid_B = torch.tensor([True, False, True])
        threshold_1 = torch.tensor([threshold], device=device)
        keep_BL, kept_B = fused.keep_patches(*given, threshold_1, min_ratio, valid_B.to(device))
        assert torch.equal(keep_BL.cpu(), expected & valid_B[:, None])
        assert torch.equal(kept_B.cpu().long(), (expected & valid_B[:, None]).sum(dim=1))


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_masks_from_images_are_those_of_the_readable_way(device: str, threshold: float) -> None:
    """Masks may differ only through patches whose similarity lies within 1e-3 of the threshold."""
    images, patch, min_ratio, patches = torch.cat([photographs(96, 64)[:2], noise(96, 64)[:1]]), 8, 0.3, 96
    anchors_BK = cluster.draw_anchors(words(Purpose.ANCHORS, patches), 3)
    expected_BL = readable_similarity(images, anchors_BK, patch, CLIP)
    threshold = float(expected_BL[0][(expected_BL[0] - threshold).abs().argmin()])  # one patch right on the threshold

    ordinal_B = ORDINALS.to(device)
    drawn_BK = fused.draw_anchors(ordinal_B, SEED, patches, 3)
    similarity_BL = fused.anchor_similarity(images.to(device), drawn_BK, patch, CLIP.mean, CLIP.std)
    keep_BL = fused.keep_patches(similarity_BL, ordinal_B, SEED, threshold, min_ratio)[0].cpu()

    drop_words_BL = words(Purpose.EXTRA_DROPS, patches)
    near_BL = (expected_BL - threshold).abs() <= 1e-3
    same_BL = torch.where(near_BL, similarity_BL.cpu(), expected_BL)  # the two agree about patches that are near
    assert torch.equal(keep_BL, cluster.keep_by_similarity(same_BL, drop_words_BL, threshold, min_ratio))
    clear_B = ~near_BL.any(dim=1)
    assert clear_B.any() and near_BL.sum() <= 3
    readable_BL = cluster.keep_by_similarity(expected_BL, drop_words_BL, threshold, min_ratio)
    assert torch.equal(keep_BL[clear_B], readable_BL[clear_B])


@pytest.mark.parametrize(
    "masking",
    [
        Masking(ratio=0.5, ratio_end=0.4),
        Masking(anchors=2, threshold=0.4),
        Masking(embedding_share=0.2, embedding_share_end=1.0),
        Masking(strategy="random"),
        Masking(strategy="centred"),
        Masking(strategy="block"),
        Masking(strategy="grid", ratio=0.75),
        Masking(strategy="none"),
    ],
    ids=lambda masking: f"{masking.strategy}-{masking.anchors}-{masking.embedding_share}",
)
def test_the_stage_gives_what_it_gives_in_plain_torch(device: str, masking: Masking) -> None:
    """Batches with holes, more than settle the threshold: masks, sequences, and where the controller goes."""
    runs, steps = [], 11 if masking.ratio_end else 3
    for fuses in (False, True):
        where = device if fuses else "cpu"
        weight = torch.randn(192, 7, generator=torch.Generator().manual_seed(5)).to(where)
        mask = MaskStage(masking, CLIP, 8, SEED, embed=lambda patches, grid, w=weight: patches @ w, fused=fuses)
        seen = []
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            coarse = torch.rand(4, 3, 6, 6, generator=generator)
            images = torch.nn.functional.interpolate(coarse, size=(40, 48), mode="bilinear") * 255
            valid_B = torch.arange(4) != step % 5
            ordinal_B = torch.arange(4 * step, 4 * step + 4)
            batch = (part.to(where) for part in (images.to(torch.uint8), ordinal_B, valid_B))
            end = mask.begin(*batch, progress=step / (steps - 1))
            masked = end()
            mask.advance(1 - float(masked.keep_BL[valid_B.to(where)].double().mean()))
            packed = masked.patches
            assert packed.grid == (5, 6)
            tensors = (masked.keep_BL, packed.position_T, packed.order_B, packed.patches_TP)
            seen.append((packed.lengths, masked.threshold, *(tensor.cpu() for tensor in tensors)))
        runs.append(seen)
    for plain, ours in zip(*runs, strict=True):
        assert plain[0] == ours[0] and plain[1] == pytest.approx(ours[1], abs=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(plain[2:5], ours[2:5], strict=True))
        torch.testing.assert_close(ours[5], plain[5], atol=2e-6, rtol=0)


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_the_packed_sequence_is_that_of_pack(device: str, patch: int) -> None:
    height, width = SIZES[patch]
    images = torch.cat([noise(height, width), photographs(height, width)])
    patches_BLP = patchify(images, patch)
    generator = torch.Generator().manual_seed(patch)
    keep_BL = torch.rand(patches_BLP.shape[:2], generator=generator) < torch.tensor([0.4, 0.9, 0.0, 0.4, 1.0])[:, None]
    expected = pack(patches_BLP, keep_BL, (height // patch, width // patch))
    values_TP = standardise(expected.patches_TP, CLIP.mean, CLIP.std)
    total = sum(expected.lengths)
    given = images.to(device), keep_BL.to(device), keep_BL.sum(dim=1).int().to(device), patch, CLIP.mean, CLIP.std
    for capacity in (total, keep_BL.numel(), total - 3):
        rows = min(capacity, total)
        found_TP, position_T, order_B = fused.gather_patches(*given, capacity, torch.float32)
        assert found_TP.shape == (capacity, 3 * patch**2)
        torch.testing.assert_close(found_TP[:rows].cpu(), values_TP[:rows], rtol=0, atol=1e-6)
        assert torch.equal(position_T[:rows].cpu(), expected.position_T[:rows])
        assert torch.equal(order_B[: len(expected.order_B)].cpu(), expected.order_B)
    half_TP = fused.gather_patches(*given, total, torch.bfloat16)[0]
    whole_TP = fused.gather_patches(*given, total, torch.float32)[0]
    if device == "cpu":  # the interpreter cuts off what the hardware rounds (test_fused_compile.py sees to that)
        step_TP = 2.0 ** (whole_TP.abs().log2().floor() - 7)
        assert ((half_TP.float() - whole_TP).abs() < step_TP).all()
    else:
        assert torch.equal(half_TP, whole_TP.bfloat16())


def test_an_empty_batch_and_a_batch_of_holes(device: str) -> None:
    images = noise(32, 32).to(device)
    nothing_BL = torch.zeros(2, 16, dtype=torch.bool, device=device)
    for rows in (2, 0):
        kept_B = nothing_BL[:rows].sum(dim=1).int()
        found = fused.gather_patches(images[:rows], nothing_BL[:rows], kept_B, 8, CLIP.mean, CLIP.std, 12)
        assert found[0].shape == (12, 192) and len(found[2]) == rows


def test_sides_must_be_multiples_of_the_patch_size(device: str) -> None:
    anchors_BK = torch.zeros(2, 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="model.patch_size=16"):
        fused.anchor_similarity(noise(32, 40).to(device), anchors_BK, 16, CLIP.mean, CLIP.std)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    images, ordinal_B, valid_B = noise(32, 32).cuda(), torch.arange(2).cuda(), torch.ones(2, dtype=torch.bool).cuda()

    def stage() -> None:
        anchors_BK = fused.draw_anchors(ordinal_B, SEED, 16, 2)
        similarity_BL = fused.anchor_similarity(images, anchors_BK, 8, CLIP.mean, CLIP.std)
        keep_BL, kept_B = fused.keep_patches(similarity_BL, ordinal_B, SEED, 0.5, 0.3, valid_B)
        fused.gather_patches(images, keep_BL, kept_B, 8, CLIP.mean, CLIP.std, 24, torch.bfloat16)

    stage()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage()
    finally:
        torch.cuda.set_sync_debug_mode("default")
