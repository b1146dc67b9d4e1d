"""Packed attention against padded and per-image attention, forward and backward:

    python tools/bench_attention.py [--preset ViT-B-16] [--batch-size 64] [--precision bf16]

Lengths are those of one real batch: kept patches (with the class token) of embedded pictures under cluster masking at
50 %, and tokens of their captions. All ways get the same packed queries, keys and values and return packed outputs, so
padding includes what it costs to pad and to take the pads out again. On a GPU xformers and torch's varlen attention are
both measured. Before timing, every way is held against the per-image one.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_step import batches_of, now, recipe_of
from cmpt.masking.strategies import MaskStage
from cmpt.ops.attention import BACKENDS, attention_backend
from cmpt.recipe.schema import Masking, Tower

Attend = Callable[[Tensor], Tensor]
BUCKETS = 4
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ViT-B-16", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of every way, in turns")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = recipe_of(options)
    (batch,) = batches_of(recipe, 1, device)
    assert recipe.model.patch_size

    def image_lengths(strategy: str) -> list[int]:
        mask = MaskStage(Masking(strategy=strategy), recipe.image, recipe.model.patch_size or 0, seed=0)
        return [length + 1 for length in mask(batch.images_BCHW, batch.ordinal_B).patches.lengths]

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.preset}, batch {options.batch_size}, {options.precision}, {name}, torch {torch.__version__}, "
          f"median of {options.repeats}; ms forward + backward of one layer\n")  # fmt: skip
    for title, tower, lengths, causal in (
        ("image, cluster masking 50 %", recipe.model.vision, image_lengths("cluster"), False),
        ("image, no masking", recipe.model.vision, image_lengths("none"), False),
        ("text, causal", recipe.model.text, batch.text.lengths, True),
    ):
        print(f"{title}: {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
        for way, milliseconds in timed(options, tower, lengths, causal, device).items():
            print(f"  {way:28} {milliseconds:8.2f}")
    return 0


def ways(lengths: Sequence[int], causal: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Attend]:
    packed = tuple(lengths)
    found: dict[str, Attend] = {"per image": lambda qkv: per_image(qkv, packed, causal)}
    if device.type == "cuda":
        if importlib.util.find_spec("xformers") is not None:
            found["packed, xformers"] = BACKENDS["xformers"](packed, causal, device)
        if dtype != torch.float32:
            found["packed, torch varlen"] = BACKENDS["varlen"](packed, causal, device)
    found["packed, products by length"] = BACKENDS["products"](packed, causal, device)
    found["padded"] = lambda qkv: padded(qkv, packed, causal)
    found[f"padded in {BUCKETS} buckets"] = lambda qkv: in_buckets(qkv, packed, causal)
    return found


def timed(
    options: argparse.Namespace, tower: Tower, lengths: Sequence[int], causal: bool, device: torch.device
) -> dict[str, float]:
    """Median milliseconds by way; the one that cmpt takes is marked."""
    assert tower.width and tower.heads
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shape = (sum(lengths), 3, tower.heads, tower.width // tower.heads)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(shape[0], *shape[2:], generator=generator).to(device, dtype)
    candidates = ways(lengths, causal, device, dtype)
    outputs = {way: attend(qkv).detach().float() for way, attend in candidates.items()}
    for way, output in outputs.items():
        apart = float((output - outputs["per image"]).norm() / outputs["per image"].norm())
        assert apart < TOLERANCE[options.precision], f"{way} computes something else: {apart:.2g}"
    seconds: dict[str, list[float]] = {way: [] for way in candidates}
    for repeat in range(options.repeats + 2):
        for way, attend in candidates.items():
            qkv.grad = None
            began = now(device)
            attend(qkv).backward(grad)
            took = now(device) - began
            if repeat >= 2:
                seconds[way].append(took)
    chosen = attention_backend(device.type, dtype)
    return {
        f"{way}{'  (cmpt)' if chosen in way else ''}": 1e3 * statistics.median(values)
        for way, values in seconds.items()
    }


def per_image(qkv_T3NH: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """One call of torch's attention per sequence."""
    out = []
    for part in qkv_T3NH.split(list(lengths)):
        query, key, value = part.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
        out.append(F.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(out)


def padded(qkv_T3NH: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """All sequences padded to the longest, one call, pads masked out (a causal mask does not need it)."""
    longest, count, device = max(lengths), len(lengths), qkv_T3NH.device
    host = torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])
    place_T = host.to(device, non_blocking=True)
    rows = qkv_T3NH.new_zeros(count * longest, *qkv_T3NH.shape[1:]).index_copy(0, place_T, qkv_T3NH)
    query, key, value = rows.view(count, longest, *qkv_T3NH.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None
    if not causal and min(lengths) < longest:
        length_B = torch.tensor(lengths).to(device, non_blocking=True)
        mask = (torch.arange(longest, device=device) < length_B[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place_T)


def in_buckets(qkv_T3NH: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """Neighbours in length padded together, in a few groups of equal size."""
    size = -(-len(lengths) // BUCKETS)
    groups = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    parts = qkv_T3NH.split([sum(group) for group in groups])
    return torch.cat([padded(part, group, causal) for part, group in zip(parts, groups, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
