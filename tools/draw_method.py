"""Draw how cluster masking works, from real images and with the code that training uses.

    python tools/draw_method.py OUT.png [--image FILE ...]

Each row is one image: its patches, a few random anchors, how much every patch is like the nearest of them, the
clusters that this gives, and what is kept. Below, the kept patches of all images as the one sequence that the model
gets. Deterministic: the same images give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import LineCollection
from numpy.typing import NDArray
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # runs from a checkout without an install

from cmpt.masking.cluster import (  # noqa: E402
    anchor_similarities,
    draw_anchors,
    hidden_counts,
    keep_by_similarity,
    nearest_anchor_similarity,
)
from cmpt.masking.patches import pack, patchify, standardise  # noqa: E402
from cmpt.monitor.pictures import HAIRLINE, INK, MUTED, Sheet, grey_hidden  # noqa: E402
from cmpt.ops.random import Purpose, random_words_tensor  # noqa: E402
from cmpt.recipe import schema  # noqa: E402
from mask_drawing import SEPARATOR, Tiling  # noqa: E402

CLIP_ART = REPOSITORY / "cmpt" / "data" / "clipart"
CHOSEN = (  # picked by eye for being easy to read
    ("train-0006.tar", "unsorted-landscape_near_the_river_01"),
    ("train-0001.tar", "plants-flowers-bouquet_of_flowers_01"),
    ("train-0006.tar", "food-fruit-tile_orange_gabriel_lo_i_01"),
)
SEED = 5  # also picked by eye
PATCH, GRID = 32, 8  # large patches, so that a person can tell them apart
TILING = Tiling(PATCH, GRID)
ANCHOR_RATIO, MIN_RATIO, TARGET = 0.05, 0.3, 0.5
CLUSTER_COLOURS = ("#d9730d", "#2f6fde", "#12946a")
NEARLY_WHITE = 200

WIDTH, MARGIN = 1000, 20
TILE, GAP, ROW_GAP, HEAD = 160, 40, 16, 62
STAGES = (
    ("1  Patches", "of an image"),
    ("2  Anchors", "drawn at random"),
    ("3  Likeness", "to the nearest anchor"),
    ("4  Clusters", "likeness above {threshold:.2f}"),
    ("5  Kept", "at least 30 % is hidden"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("--image", type=Path, action="append", help="a picture to use instead of clip art; repeat it")
    arguments = parser.parse_args()
    images = [Image.open(path) for path in arguments.image] if arguments.image else clip_art()
    png = draw(np.stack([square(image) for image in images]))
    # 256 colours are enough for flat art and make the file a third as large.
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        arguments.out, optimize=True
    )


def clip_art() -> list[Image.Image]:
    """The chosen images of the embedded data set."""
    return [Image.open(io.BytesIO(_member(CLIP_ART / shard, f"{key}.jpg"))) for shard, key in CHOSEN]


def _member(shard: Path, name: str) -> bytes:
    with tarfile.open(shard) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{name} is a regular member"
        return file.read()


def square(image: Image.Image) -> NDArray[np.uint8]:
    """The middle of an image, without white margins, at the size of the drawing: uint8 [H, W, C]."""
    image = image.convert("RGB")
    marked = Image.fromarray((np.asarray(image) < NEARLY_WHITE).any(axis=-1))
    image = image.crop(marked.getbbox())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((PATCH * GRID, PATCH * GRID), Image.Resampling.LANCZOS))


def draw(images_NHWC: NDArray[np.uint8]) -> bytes:
    """The whole picture as PNG."""
    count = len(images_NHWC)
    pixels_BLP = patchify(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2), PATCH)
    patches_BLP = standardise(pixels_BLP, schema.Image().mean, schema.Image().std)
    ordinal_B = torch.arange(count)
    anchor_words_BL = random_words_tensor(SEED, ordinal_B, Purpose.ANCHORS, GRID * GRID)
    drop_words_BL = random_words_tensor(SEED, ordinal_B, Purpose.EXTRA_DROPS, GRID * GRID)
    anchors_BK = draw_anchors(anchor_words_BL, int(ANCHOR_RATIO * GRID * GRID))
    similarity_BLK = anchor_similarities(patches_BLP, anchors_BK)
    similarity_BL = nearest_anchor_similarity(similarity_BLK, anchors_BK)
    threshold = threshold_for(similarity_BL)
    keep_BL = keep_by_similarity(similarity_BL, drop_words_BL, threshold, MIN_RATIO)
    cluster_BL = torch.where(similarity_BL > threshold, nearest_anchor(similarity_BLK, anchors_BK), -1)

    band = HEAD + count * TILE + (count - 1) * ROW_GAP
    sheet = Sheet(WIDTH, band + 142)
    for stage, (title, subtitle) in enumerate(STAGES):
        x = MARGIN + stage * (TILE + GAP)
        sheet.text(x, 26, title, size=14, weight="bold")
        sheet.text(x, 45, subtitle.format(threshold=threshold), size=11, colour=MUTED)
    for row in range(count):
        y = HEAD + row * (TILE + ROW_GAP)
        tiles = [
            sheet.image(MARGIN + stage * (TILE + GAP), y, TILE, TILE, images_NHWC[row]) for stage in range(len(STAGES))
        ]
        colours = [CLUSTER_COLOURS[k % len(CLUSTER_COLOURS)] for k in range(anchors_BK.shape[1])]
        anchors = anchors_BK[row].tolist()
        TILING.lines(tiles[0], SEPARATOR, 0.6)
        TILING.veil(tiles[1], 0.62)
        TILING.show_through(tiles[1], images_NHWC[row], anchors)
        TILING.likeness(tiles[2], similarity_BL[row].numpy())
        TILING.veil(tiles[3], 0.62)
        TILING.clusters(tiles[3], cluster_BL[row].tolist(), colours)
        grey_hidden(tiles[4], keep_BL[row].numpy().reshape(GRID, GRID), PATCH)
        for stage in (1, 2, 3):
            TILING.outline(tiles[stage], anchors, colours)
        for stage in range(len(STAGES)):
            sheet.frame(MARGIN + stage * (TILE + GAP), y, TILE, TILE, HAIRLINE, 0.8)
            if stage:
                between = MARGIN + stage * (TILE + GAP) - GAP / 2
                sheet.text(between, y + TILE / 2, "→", size=17, colour=MUTED, across="center", down="center")
    sequence(sheet, band + 34, pixels_BLP, keep_BL)
    return sheet.png()


def threshold_for(similarity_BL: torch.Tensor) -> float:
    """The threshold at which the mean mask ratio of these images is nearest to the target."""
    candidates = similarity_BL[similarity_BL <= 1].unique().tolist()
    ratio = [float(hidden_counts(similarity_BL, t, MIN_RATIO).float().mean()) / GRID**2 for t in candidates]
    return candidates[int(np.argmin(np.abs(np.array(ratio) - TARGET)))]


def nearest_anchor(similarity_BLK: torch.Tensor, anchors_BK: torch.Tensor) -> torch.Tensor:
    """Which anchor each patch is most like, int64 [B, L]; an anchor is most like itself."""
    own = torch.arange(anchors_BK.shape[1]).expand_as(anchors_BK)
    return similarity_BLK.argmax(dim=-1).scatter(1, anchors_BK, own)


def sequence(sheet: Sheet, y: float, pixels_BLP: torch.Tensor, keep_BL: torch.Tensor) -> None:
    """The packed tokens in one row, with the boundaries between images."""
    packed = pack(pixels_BLP, keep_BL, (GRID, GRID))
    pixels = packed.patches_TP.reshape(-1, 3, PATCH, PATCH).permute(0, 2, 3, 1).numpy()
    side = (WIDTH - 2 * MARGIN) / len(pixels)
    sheet.text(MARGIN, y, "6  One sequence of kept patches, all images, no padding", size=14, weight="bold")
    top, begun = y + 20, 0
    tall = max(side, 14)
    sheet.image(MARGIN, top, WIDTH - 2 * MARGIN, tall, np.concatenate(list(pixels), axis=1))
    row = sheet.axes(MARGIN, top, WIDTH - 2 * MARGIN, tall)
    row.set_xlim(0, len(pixels))
    row.set_ylim(0, 1)
    row.add_collection(
        LineCollection([((x, 0), (x, 1)) for x in range(len(pixels) + 1)], colors=SEPARATOR, linewidths=0.6)
    )
    sheet.frame(MARGIN, top, WIDTH - 2 * MARGIN, tall, HAIRLINE, 0.8)
    for image, length in zip(packed.order_B.tolist(), packed.lengths, strict=True):
        left, right = MARGIN + begun * side + 2, MARGIN + (begun + length) * side - 2
        bracket(sheet, left, right, top + tall + 6)
        label = f"row {image + 1}: {length} of {GRID * GRID} patches"
        sheet.text((left + right) / 2, top + tall + 28, label, size=11, across="center")
        begun += length
    note = "Attention stays within the patches of one image; hidden patches are never computed."
    sheet.text(WIDTH - MARGIN, y, note, size=11, colour=MUTED, across="right")


def bracket(sheet: Sheet, left: float, right: float, top: float) -> None:
    axes = sheet.axes(left, top, right - left, 7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.plot([0, 0, 1, 1], [1, 0.1, 0.1, 1], color=INK, linewidth=1.0)


if __name__ == "__main__":
    main()
