from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cmpt.batch import PackedPatches, PackedText
from cmpt.masking.patches import pack, patchify, standardise
from cmpt.models.clip import CLIP, parameter_groups
from cmpt.recipe.schema import Image, Model, Text, Tower, Vision

MODEL = Model(
    patch_size=8,
    embed_dim=24,
    vision=Vision(width=32, layers=3, heads=2),
    text=Text(width=48, layers=2, heads=3),
    context_length=16,
    vocab_size=50,
)


# Every option that changes what a tower computes, away from its default.
OPTIONS = replace(
    MODEL,
    vision=Vision(32, 3, 2, mlp_ratio=2.5, layer_norm_eps=1e-2, layer_scale_init=0.3, pooling="average"),
    text=Text(48, 2, 3, mlp_ratio=1.5, layer_norm_eps=1e-2, layer_scale_init=0.3, pooling="argmax"),
    quick_gelu=True,
    logit_bias_init=-10.0,
)
MODELS = {"plain": MODEL, "options": OPTIONS}


def clip(image_size: int = 32, seed: int = 0, model: Model = MODEL) -> CLIP:
    return CLIP(model, image_size, seed).double()


def masked_images(count: int = 6, size: int = 32) -> tuple[PackedPatches, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    patches = standardise(patchify(images, 8), Image().mean, Image().std)
    keep = torch.rand(patches.shape[:2], generator=generator) < torch.linspace(0.2, 1.0, count)[:, None]
    keep[:, 0] = True
    keep[1] = keep[0]  # two of a length, the rest different
    keep[-2] = keep[-2].cumsum(0) == 1  # one patch
    return pack(patches, keep, (size // 8, size // 8)), keep


def captions(lengths: tuple[int, ...] = (16, 9, 5, 5, 2, 1)) -> PackedText:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 50, (sum(lengths),), generator=generator)
    order = torch.randperm(len(lengths), generator=generator)
    return PackedText(ids, torch.cat([torch.arange(n) for n in lengths]), list(lengths), order)


def sequences(packed: PackedPatches | PackedText) -> list[slice]:
    ends = torch.tensor(packed.lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, packed.lengths, strict=True)]


def loop_images(model: CLIP, packed: PackedPatches, settings: Model = MODEL) -> torch.Tensor:
    """The vision tower written anew, one image at a time, with torch's own attention."""
    visual, out = model.visual, []
    for part in sequences(packed):
        x = packed.patches_TP[part].double() @ visual.patch_embedding.weight.T
        x = x + visual.positional_embedding[1 + packed.position_T[part]]
        x = torch.cat([visual.class_embedding[None] + visual.positional_embedding[:1], x])
        x = loop_norm(visual.ln_pre, x, settings.vision)
        x = loop_blocks(visual.transformer, x, settings.vision, settings.quick_gelu, causal=False)
        x = loop_norm(visual.ln_post, x, settings.vision)
        pooled = x[1:].mean(dim=0) if settings.vision.pooling == "average" else x[0]
        out.append(pooled @ visual.proj.weight.T)
    return torch.stack(out)


def loop_texts(model: CLIP, packed: PackedText, settings: Model = MODEL) -> torch.Tensor:
    text, out = model.text, []
    for part in sequences(packed):
        ids = packed.ids_U[part]
        x = text.token_embedding.weight[ids] + text.positional_embedding[: len(ids)]
        x = loop_blocks(text.transformer, x, settings.text, settings.quick_gelu, causal=True)
        place = ids.tolist().index(int(ids.max())) if settings.text.pooling == "argmax" else len(ids) - 1
        out.append(loop_norm(text.ln_final, x, settings.text)[place] @ text.proj.weight.T)
    return torch.stack(out)


def loop_norm(norm: torch.nn.Module, x: torch.Tensor, tower: Tower) -> torch.Tensor:
    """LayerNorm with the recipe's epsilon, not the module's."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.pow(2).mean(dim=-1, keepdim=True)
    return centred / (variance + tower.layer_norm_eps).sqrt() * norm.weight + norm.bias


def loop_blocks(
    transformer: torch.nn.Module, x: torch.Tensor, tower: Tower, quick_gelu: bool, causal: bool
) -> torch.Tensor:
    for block in transformer.blocks:
        attn = block.attn
        gain_1, gain_2 = (1.0, 1.0) if tower.layer_scale_init is None else (block.ls_1.gain, block.ls_2.gain)
        qkv = F.linear(loop_norm(block.ln_1, x, tower), attn.in_proj.weight, attn.in_proj.bias)
        q, k, v = (t.view(len(x), attn.heads, -1).transpose(0, 1) for t in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
        x = x + gain_1 * F.linear(mixed.transpose(0, 1).flatten(1), attn.out_proj.weight, attn.out_proj.bias)
        hidden = F.linear(loop_norm(block.ln_2, x, tower), block.c_fc.weight, block.c_fc.bias)
        hidden = hidden / (1 + (-1.702 * hidden).exp()) if quick_gelu else F.gelu(hidden)
        x = x + gain_2 * F.linear(hidden, block.c_proj.weight, block.c_proj.bias)
    return x


@pytest.mark.parametrize("options", MODELS)
@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_packed_equals_per_image_loop(tower: str, dtype: torch.dtype, tolerance: float, options: str) -> None:
    """Forward and backward, against a loop in float64 (invariant 1), from one token to all of them."""
    settings = MODELS[options]
    reference, ours = clip(model=settings), clip(model=settings)
    if dtype != torch.float64:
        ours = ours.float()
    if tower == "visual":
        packed, _ = masked_images()
        assert {1, 16} < set(packed.lengths)
        expected, found = loop_images(reference, packed, settings), ours.visual(packed, dtype)
    else:
        text = captions()
        assert {1, 16} < set(text.lengths)
        expected, found = loop_texts(reference, text, settings), ours.text(text, dtype)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected.backward(grad)
    found.backward(grad.to(found.dtype))
    assert relative(found, expected) < tolerance
    wanted = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith(tower) and parameter.grad is not None:
            assert relative(parameter.grad, wanted[name].grad) < tolerance, name
    assert sum(p.grad is not None for p in ours.parameters()) > 10


def relative(found: torch.Tensor, expected: torch.Tensor | None) -> float:
    assert expected is not None
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_and_no_captions_give_no_rows(dtype: torch.dtype) -> None:
    """A rank whose images are all holes, or that has no held-out pairs, still takes part."""
    model, none = clip().float(), torch.zeros(0, dtype=torch.int64)
    image = model.visual(PackedPatches(torch.zeros(0, 192), none, [], none, (4, 4)), dtype)
    text = model.text(PackedText(none, none, [], none), dtype)
    assert image.shape == text.shape == (0, 24)
    (image.sum() + text.sum()).backward()


def test_gradients_of_positions_are_summed_in_fp32_over_many_images() -> None:
    """1,000 images that all send the same gradient to the class token's position: a bf16 sum would stop at 256."""
    model = clip().float()
    count = 1000
    packed = PackedPatches(
        torch.zeros(count, 192), torch.zeros(count, dtype=torch.int64), [1] * count, torch.arange(count), (4, 4)
    )
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        model.visual(packed, dtype).sum().backward()
        assert model.visual.positional_embedding.grad is not None
        grads[dtype] = model.visual.positional_embedding.grad[0].double()
    assert relative(grads[torch.bfloat16], grads[torch.float32]) < 0.05


def test_another_image_changes_no_bit() -> None:
    model = clip().float()
    packed, _ = masked_images()
    part = sequences(packed)[2]
    changed = packed.patches_TP.clone()
    changed[part] += 0.5
    other = PackedPatches(changed, packed.position_T, packed.lengths, packed.order_B, packed.grid)
    for dtype in (torch.float32, torch.bfloat16):
        before, after = model.visual(packed, dtype), model.visual(other, dtype)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i != 2 for i in range(len(packed.lengths))]


def test_another_caption_changes_no_bit() -> None:
    model, text = clip().float(), captions()
    changed = text.ids_U.clone()
    changed[0] = (changed[0] + 1) % 50
    before = model.text(text, torch.float32)
    after = model.text(PackedText(changed, text.position_U, text.lengths, text.order_B), torch.float32)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False] + [True] * 5


def test_features_come_back_in_batch_order_and_holes_are_zero() -> None:
    model = clip().float()
    packed, _ = masked_images()
    batch = model.encode_image(packed, 8)
    torch.testing.assert_close(batch[packed.order_B], F.normalize(model.visual(packed, torch.float32), dim=-1))
    assert not batch[6:].any()


def test_no_padding_token_reaches_a_tower() -> None:
    """Rows that each block sees: one class token and the kept patches of every image, and every text token."""
    model = clip().float()
    seen: dict[str, list[int]] = {"visual": [], "text": []}
    for name in seen:
        for block in getattr(model, name).transformer.blocks:
            block.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(len(inputs[0])))
    packed, keep_BL = masked_images()
    text = captions()
    model(packed, text, 6)
    assert set(seen["visual"]) == {int(keep_BL.sum()) + len(keep_BL)}
    assert set(seen["text"]) == {sum(text.lengths)}


def test_dropped_patches_never_reach_the_patch_embedding() -> None:
    model = clip().float()
    rows: list[int] = []
    model.visual.patch_embedding.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    packed, keep_BL = masked_images()
    model.visual(packed, torch.float32)
    assert rows == [int(keep_BL.sum())]


def test_positions_for_another_grid_are_interpolated() -> None:
    model = clip(image_size=32).float()
    assert model.visual.positions((4, 4)) is model.visual.positional_embedding
    larger = model.visual.positions((8, 6))
    assert larger.shape == (1 + 48, 32)
    torch.testing.assert_close(larger[0], model.visual.positional_embedding[0])
    packed, _ = masked_images(size=64)
    assert model.visual(packed, torch.float32).shape == (6, 24)


def test_weights_are_a_function_of_the_seed() -> None:
    first, same, other = clip(seed=1), clip(seed=1), clip(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.visual.proj.weight, other.visual.proj.weight)


def test_temperature_starts_as_clip_says_and_stays_within_its_bound() -> None:
    model = clip().float()
    assert model.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100) + 0.3)
    scale = model.scale()
    assert scale.item() == pytest.approx(100.0)
    (-scale).sum().backward()  # asks for more: no
    assert model.logit_scale.grad is not None and model.logit_scale.grad.item() == 0.0
    model.scale().sum().backward()  # asks for less: passes
    assert model.logit_scale.grad.item() == pytest.approx(100.0)


def test_decay_spares_gains_biases_and_the_temperature() -> None:
    model = clip()
    groups = parameter_groups(model)
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
    assert set(groups["temperature"]) == {"logit_scale"}
    assert set(parameter_groups(clip(model=OPTIONS))["temperature"]) == {"logit_scale", "logit_bias"}
    for name, group in groups.items():
        for parameter in group:
            gain_or_bias = parameter.endswith("bias") or ".ln_" in parameter or parameter == "visual.class_embedding"
            if name != "temperature":
                assert gain_or_bias == name.endswith("no_decay"), parameter


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain = clip()
    recomputed = CLIP(Model(**{**vars(MODEL), "activation_checkpointing": True}), 32).double()
    packed, _ = masked_images()
    for model in (plain, recomputed):
        model.visual(packed, torch.float64).sum().backward()
    for a, b in zip(plain.visual.parameters(), recomputed.visual.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
