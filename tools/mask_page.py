"""The page about one image: how cluster masking comes about, and what every strategy keeps (see `show_masks.py`)."""

from __future__ import annotations

import colorsys
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmpt.monitor.pictures import HAIRLINE, MUTED, Sheet, grey_hidden
from mask_drawing import LIKENESS, SEPARATOR, Tiling
from mask_views import GRID_RATIO, Settings, View

MARGIN = 24
LARGE, LARGE_GAP = 212, 23  # five across
SMALL, SMALL_GAP = 172, 24  # six across
ACROSS = 6
WIDTH = 2 * MARGIN + ACROSS * SMALL + (ACROSS - 1) * SMALL_GAP
FIRST_ROW = 146  # where the tiles of the first row begin
HEAD = 92  # from the end of a row's tiles, and what stands below them, to the tiles of the next
BELOW_FIRST, BELOW = 56, 20
MOST_TITLE, MOST_LINE = 84, 158  # characters that fit across the page
COLOURS = ("#d9730d", "#2f6fde", "#12946a", "#b0379b", "#c8323c", "#7a5c00")
VEIL, VEIL_OF_CLUSTERS = 0.62, 0.75
FROM = {"random": "FLIP", "centred": "GLIP", "block": "CLIPA", "grid": "CLIPA"}


@dataclass(frozen=True)
class Caption:
    """What stands above the tiles."""

    title: str
    about: str  # sizes, recipe, draw
    threshold: str  # which, and where from


def large_tile(place: int) -> tuple[float, float]:
    """x and y of a tile of the first row: image, anchors, similarity, clusters, kept."""
    return MARGIN + place * (LARGE + LARGE_GAP), FIRST_ROW


def strategy_tile(place: int) -> tuple[float, float]:
    """x and y of a strategy's tile, in the order of `Settings.strategies`; after them comes the smaller image."""
    first = FIRST_ROW + LARGE + BELOW_FIRST + HEAD + SMALL + HEAD
    row, column = divmod(place, ACROSS)
    return MARGIN + column * (SMALL + SMALL_GAP), first + row * (SMALL + BELOW + 52)


def page(view: View, smaller_HWC: NDArray[np.uint8], settings: Settings, threshold: float, caption: Caption) -> bytes:
    """The picture as PNG: the same arguments give the same bytes."""
    tiling = Tiling(settings.patch_size, settings.grid)
    last = strategy_tile(len(settings.strategies))[1]
    sheet = Sheet(WIDTH, last + SMALL + BELOW + 20)
    sheet.text(MARGIN, 42, shortened(caption.title, MOST_TITLE), size=20, weight="bold")
    sheet.text(MARGIN, 68, shortened(caption.about, MOST_LINE), size=12.5, colour=MUTED)
    sheet.text(MARGIN, 88, shortened(caption.threshold, MOST_LINE), size=12.5, colour=MUTED)
    _first_row(sheet, view, tiling, threshold)
    _anchor_row(sheet, view, tiling, threshold)
    _strategy_row(sheet, view, smaller_HWC, tiling, settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a file name in a script that the font does not have
        return sheet.png()


def _first_row(sheet: Sheet, view: View, tiling: Tiling, threshold: float) -> None:
    patches, anchors = tiling.grid**2, len(view.anchors)
    clustered = patches - view.cluster_L.count(-1)
    titles = (
        ("Image", f"{tiling.grid} × {tiling.grid} patches"),
        ("Anchors", f"{anchors} drawn at random" if anchors > 1 else "one, drawn at random"),
        ("Similarity", "to the nearest anchor"),
        ("Clusters", f"similarity above {threshold:.2f}"),
        ("Kept", f"{_percent(view.keep['cluster'].mean())} of the patches"),
    )
    tiles = []
    for place, (title, subtitle) in enumerate(titles):
        x, y = large_tile(place)
        sheet.text(x, y - 26, title, size=15, weight="bold")
        sheet.text(x, y - 9, subtitle, size=12, colour=MUTED)
        tiles.append(sheet.image(x, y, LARGE, LARGE, view.image_HWC))
        sheet.frame(x, y, LARGE, LARGE, HAIRLINE, 0.8)
    colours, thin = colours_of(anchors), _thinness(LARGE / tiling.grid)
    tiling.lines(tiles[0], SEPARATOR, 0.6 * thin)
    tiling.veil(tiles[1], VEIL)
    tiling.show_through(tiles[1], view.image_HWC, view.anchors)
    tiling.likeness(tiles[2], view.similarity_L, _lowest(threshold), 0.7 * thin)
    tiling.veil(tiles[3], VEIL_OF_CLUSTERS)
    tiling.clusters(tiles[3], view.cluster_L, colours, 0.7 * thin)
    grey_hidden(tiles[4], view.keep["cluster"].reshape(tiling.grid, tiling.grid), tiling.patch)
    for tile in tiles[1:4]:
        tiling.outline(tile, view.anchors, colours, max(0.9, 2 * thin))
    _scale(sheet, *large_tile(2), threshold)
    x, y = large_tile(4)
    hidden_by_clusters = patches - int(view.keep["cluster"].sum()) - view.extra_drops
    assert hidden_by_clusters in (clustered, clustered - 1)  # one stays where everything would go
    lines = (
        f"{hidden_by_clusters} hidden by clusters",
        f"{view.extra_drops} hidden by extra drops",
        f"{int(view.keep['cluster'].sum())} kept",
    )
    for number, line in enumerate(lines):
        sheet.text(x, y + LARGE + 18 + 17 * number, line, size=12)


def _scale(sheet: Sheet, x: float, y: float, threshold: float) -> None:
    """The colour bar of the similarities under a large tile, with the threshold on it."""
    low, top, height = _lowest(threshold), y + LARGE + 8, 9
    bar = sheet.axes(x, top, LARGE, height)
    bar.imshow(np.linspace(low, 1, 256)[None], cmap=LIKENESS, vmin=low, vmax=1, aspect="auto", extent=(low, 1, 0, 1))
    sheet.frame(x, top, LARGE, height, SEPARATOR, 0.8)
    at = x + LARGE * (min(max(threshold, low), 1) - low) / (1 - low)
    mark = sheet.axes(at - 1, top - 3, 2, height + 6)
    mark.imshow(np.zeros((1, 1)), cmap="gray", aspect="auto", extent=(0, 1, 0, 1))
    sheet.text(x, top + height + 15, "≤ 0" if low == 0 else f"{low:g}", size=11, colour=MUTED)
    sheet.text(x + LARGE, top + height + 15, "1", size=11, colour=MUTED, across="right")
    middle = min(max(at, x + 50), x + LARGE - 50)  # so that the text stays under the bar
    sheet.text(middle, top + height + 31, f"threshold {threshold:.2f}", size=12, across="center")


def _anchor_row(sheet: Sheet, view: View, tiling: Tiling, threshold: float) -> None:
    anchors, top = len(view.anchors), FIRST_ROW + LARGE + BELOW_FIRST + HEAD
    shown = min(anchors, ACROSS)
    some = "" if shown == anchors else f", the {shown} of {anchors} anchors with the largest clusters"
    sheet.text(MARGIN, top - 50, f"Similarity to each anchor{some}", size=15, weight="bold")
    colours, thin = colours_of(anchors), _thinness(SMALL / tiling.grid)
    for k in range(shown):
        x = MARGIN + k * (SMALL + SMALL_GAP)
        size = view.cluster_size(k)
        sheet.text(x, top - 26, f"Anchor {k + 1}", size=13, weight="bold", colour=colours[k])
        sheet.text(x, top - 9, f"{size} patch{'es' if size != 1 else ''} in its cluster", size=12, colour=MUTED)
        tile = sheet.image(x, top, SMALL, SMALL, view.image_HWC)
        tiling.likeness(tile, view.similarity_KL[k], _lowest(threshold), 0.7 * thin)
        tiling.outline(tile, [view.anchors[k]], [colours[k]], max(1.4, 2 * thin))
        sheet.frame(x, top, SMALL, SMALL, HAIRLINE, 0.8)


def _strategy_row(sheet: Sheet, view: View, smaller_HWC: NDArray[np.uint8], tiling: Tiling, settings: Settings) -> None:
    ratio = settings.masking.ratio
    heading = f"What each strategy keeps, masking.ratio = {ratio:g}"
    sheet.text(MARGIN, strategy_tile(0)[1] - 50, heading, size=15, weight="bold")
    if view.background:
        white = f"{_percent(view.background)} of the patches are white background"
        sheet.text(WIDTH - MARGIN, strategy_tile(0)[1] - 50, white, size=12, colour=MUTED, across="right")
    for place, strategy in enumerate(settings.strategies):
        x, y = strategy_tile(place)
        title = f"{strategy} ({FROM[strategy]})" if strategy in FROM else strategy
        _headed(sheet, x, y, title, f"{_percent(1 - view.keep[strategy].mean())} hidden", strategy, settings)
        tile = sheet.image(x, y, SMALL, SMALL, view.image_HWC)
        grey_hidden(tile, view.keep[strategy].reshape(tiling.grid, tiling.grid), tiling.patch)
        sheet.frame(x, y, SMALL, SMALL, HAIRLINE, 0.8)
        share = view.hidden_background(strategy)
        if view.background and share is not None:
            sheet.text(x, y + SMALL + 17, f"of these {_percent(share)} white", size=12, colour=MUTED)
    x, y = strategy_tile(len(settings.strategies))
    smaller = len(smaller_HWC)
    fewer = 1 - (smaller / settings.image.size) ** 2
    _headed(sheet, x, y, "smaller image", f"{smaller} px, {_percent(fewer)} fewer patches", "", settings)
    side = SMALL * smaller / settings.image.size
    tile = sheet.image(x, y, side, side, smaller_HWC)
    Tiling(tiling.patch, smaller // tiling.patch).lines(tile, SEPARATOR, 0.6 * _thinness(SMALL / tiling.grid))
    sheet.frame(x, y, side, side, HAIRLINE, 0.8)


def _headed(sheet: Sheet, x: float, y: float, title: str, subtitle: str, strategy: str, settings: Settings) -> None:
    sheet.text(x, y - 26, title, size=13, weight="bold")
    if strategy == settings.masking.strategy:
        subtitle += " (the recipe's)"
    elif strategy == "grid" and settings.masking.ratio != GRID_RATIO:
        subtitle += ", always"
    sheet.text(x, y - 9, subtitle, size=12, colour=MUTED)


def colours_of(anchors: int) -> list[str]:
    """One for each anchor; the first ones are easy to tell apart."""
    more = [colorsys.hsv_to_rgb(0.13 + 0.618 * n % 1, 0.75, 0.7) for n in range(anchors - len(COLOURS))]
    return [*COLOURS, *("#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in more)][:anchors]


def shortened(text: str, most: int) -> str:
    """At most so many characters, the middle left out."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]} … {text[len(text) - most // 2 + 2 :]}"


def _lowest(threshold: float) -> float:
    """Where the colours of similarities begin: what is unlike is all the same, unless the threshold lies there."""
    return 0.0 if threshold >= 0 else -1.0


def _thinness(cell: float) -> float:
    """Lines in proportion where a patch is only a few pixels of the page wide."""
    return min(1.0, cell / 12)


def _percent(share: float) -> str:
    digits = 1 if 0 < share < 0.01 or 0.99 < share < 1 else 0  # one patch of many is not nothing
    return f"{100 * share:.{digits}f} %"
