"""Pictures for a person, as PNG bytes: what the model sees of an image, and what it finds for a caption.

Pure functions of their arguments: the same arrays give the same bytes. Sizes below are pixels at scale 1; a PNG has
`SCALE` times as many, for sharp print on dense screens.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

SCALE = 2
INK, MUTED, HAIRLINE = "#1b1f27", "#6b7280", "#e3e6eb"
HIDDEN_FILL, HIDDEN_EDGE = "#b6bcc7", "#cbd0d9"
RIGHT = "#15924b"

_WIDTH = 960
_MARGIN = 16
_TITLE_HEIGHT = 34


class Sheet:
    """A white page addressed in pixels from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / 100, height / 100), dpi=100 * SCALE, facecolor="white")
        FigureCanvasAgg(self._figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Empty axes without frame over a rectangle of the page."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self._figure.add_axes(box)
        axes.set_axis_off()
        return axes

    def image(self, x: float, y: float, width: float, height: float, image_HWC: NDArray[np.uint8]) -> Axes:
        """Draws an image; the axes that come back have its pixels as coordinates, row 0 on top."""
        axes = self.axes(x, y, width, height)
        rows, columns = image_HWC.shape[:2]
        axes.imshow(image_HWC, extent=(0, columns, rows, 0), aspect="auto", interpolation="antialiased")
        return axes

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        colour: str = INK,
        weight: str = "normal",
        across: str = "left",
        down: str = "baseline",
    ) -> None:
        """`size` in pixels; `across` and `down` say which point of the text (x, y) is, as matplotlib names them."""
        self._figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size * 0.72,
            color=colour,
            fontweight=weight,
            ha=across,
            va=down,
            linespacing=1.35,
            family="DejaVu Sans",  # comes with matplotlib, so the picture is the same everywhere
            parse_math=False,
        )

    def frame(self, x: float, y: float, width: float, height: float, colour: str, thickness: float = 1) -> None:
        """A frame whose inner edge is the given rectangle."""
        half = thickness / 2
        corner = ((x - half) / self.width, 1 - (y + height + half) / self.height)
        self._figure.add_artist(
            Rectangle(
                corner,
                (width + thickness) / self.width,
                (height + thickness) / self.height,
                fill=False,
                edgecolor=colour,
                linewidth=thickness * 0.72,
                joinstyle="miter",
            )
        )

    def png(self) -> bytes:
        out = io.BytesIO()
        self._figure.savefig(out, format="png", dpi=100 * SCALE, metadata={"Software": None})
        return out.getvalue()


def mask_grid(images_NHWC: NDArray[np.uint8], keep_NL: NDArray[np.bool_], patch_size: int, title: str) -> bytes:
    """Pairs of an image and what masking leaves of it: hidden patches are grey. Each pair carries its mask ratio.

    Raises ValueError if the mask does not fit the images.
    """
    count, rows, columns = images_NHWC.shape[:3]
    grid = (rows // patch_size, columns // patch_size)
    if keep_NL.shape != (count, grid[0] * grid[1]):
        raise ValueError(f"keep_NL: got shape {keep_NL.shape}, expected {(count, grid[0] * grid[1])}")
    across = next((n for n in (4, 3) if count % n == 0), min(count, 4))
    gap, inner, label = 24, 3, 26
    tile = (_WIDTH - 2 * _MARGIN - 3 * gap - 4 * inner) / 8 if across == 4 else 140
    tall = tile * rows / columns
    pair = 2 * tile + inner
    lines = -(-count // across)
    width = 2 * _MARGIN + across * pair + (across - 1) * gap
    sheet = Sheet(round(width), round(_TITLE_HEIGHT + lines * (tall + label) + 4))
    sheet.text(_MARGIN, 23, title, size=13.5, weight="bold")
    for index in range(count):
        x = _MARGIN + index % across * (pair + gap)
        y = _TITLE_HEIGHT + index // across * (tall + label)
        image_HWC, keep_L = images_NHWC[index], keep_NL[index]
        sheet.image(x, y, tile, tall, image_HWC)
        grey_hidden(sheet.image(x + tile + inner, y, tile, tall, image_HWC), keep_L.reshape(grid), patch_size)
        for left in (x, x + tile + inner):
            sheet.frame(left, y, tile, tall, HAIRLINE, 0.8)
        sheet.text(x + pair, y + tall + 15, f"{100 * (1 - keep_L.mean()):.0f} % hidden", 10.5, MUTED, across="right")
    return sheet.png()


def grey_hidden(axes: Axes, keep_grid: NDArray[np.bool_], patch_size: int) -> None:
    """Covers the patches that are not kept; `axes` as from `Sheet.image`."""
    hidden = [
        Rectangle((column * patch_size, row * patch_size), patch_size, patch_size)
        for row, column in np.argwhere(~keep_grid)
    ]
    axes.add_collection(PatchCollection(hidden, facecolor=HIDDEN_FILL, edgecolor=HIDDEN_EDGE, linewidth=0.5))


def query_grid(
    queries: Sequence[str],
    images_NKHWC: NDArray[np.uint8],
    hits_NK: NDArray[np.bool_],
    scores_NK: NDArray[np.floating],
    title: str = "What the model finds for a caption, best match first",
) -> bytes:
    """One row per text query with its best images, the right one framed in green; under each image its similarity.

    K is the number of images per query (five, usually). Raises ValueError if the arrays do not fit each other.
    """
    count, best, rows, columns = images_NKHWC.shape[:4]
    if len(queries) != count or hits_NK.shape != (count, best) or scores_NK.shape != (count, best):
        raise ValueError(
            f"query_grid: got {len(queries)} queries, hits {hits_NK.shape}, scores {scores_NK.shape}, "
            f"expected {count} and {(count, best)} as in the images"
        )
    words, gap, label = 250, 14, 30
    tile = (_WIDTH - 2 * _MARGIN - words - (best - 1) * gap) / best
    tall = tile * rows / columns
    sheet = Sheet(_WIDTH, round(_TITLE_HEIGHT + 6 + count * (tall + label) + _MARGIN - 8))
    sheet.text(_MARGIN, 23, title, size=13.5, weight="bold")
    for row, query in enumerate(queries):
        y = _TITLE_HEIGHT + 6 + row * (tall + label)
        sheet.text(_MARGIN, y + tall / 2, _wrapped(query), size=12, down="center")
        if not hits_NK[row].any():
            sheet.text(_MARGIN, y + tall + 15, f"its own picture is not among the best {best}", 10, MUTED)
        for place in range(best):
            x = _MARGIN + words + place * (tile + gap)
            sheet.image(x, y, tile, tall, images_NKHWC[row, place])
            right = bool(hits_NK[row, place])
            sheet.frame(x, y, tile, tall, RIGHT if right else HAIRLINE, 3.5 if right else 0.8)
            score = f"{round(float(scores_NK[row, place]), 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
            if right:
                sheet.text(x + tile / 2, y + tall + 17, f"✓ {score}", 10.5, RIGHT, "bold", across="center")
            else:
                sheet.text(x + tile / 2, y + tall + 17, score, 10.5, MUTED, across="center")
    return sheet.png()


def _wrapped(caption: str, characters: int = 31, lines: int = 6) -> str:
    return (
        "\n".join(textwrap.wrap(caption, characters, max_lines=lines, placeholder=" …", break_on_hyphens=False))
        or "(empty caption)"
    )
