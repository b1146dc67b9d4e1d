"""What pictures of masking are made of: patch grids, anchors, likenesses and clusters over an image on a `Sheet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

SEPARATOR = "#aab1bd"
LIKENESS = LinearSegmentedColormap.from_list("likeness", ["#f5f6f9", "#a9bfe8", "#2b4fa8"])


@dataclass(frozen=True)
class Tiling:
    """A square image of `grid` x `grid` patches; what is drawn goes into axes that have its pixels as coordinates."""

    patch: int  # side of a patch in pixels
    grid: int  # patches along a side

    @property
    def side(self) -> int:
        """Of the image, in pixels."""
        return self.patch * self.grid

    def corner(self, index: int) -> tuple[int, int]:
        """x and y of a patch's upper left pixel; patches count in raster order."""
        return index % self.grid * self.patch, index // self.grid * self.patch

    def cell(self, index: int) -> Rectangle:
        """The square of one patch."""
        return Rectangle(self.corner(index), self.patch, self.patch)

    def lines(self, axes: Axes, colour: str, width: float) -> None:
        """The borders between patches."""
        at = range(self.patch, self.side, self.patch)
        segments = [((x, 0), (x, self.side)) for x in at] + [((0, y), (self.side, y)) for y in at]
        axes.add_collection(LineCollection(segments, colors=colour, linewidths=width))

    def veil(self, axes: Axes, strength: float) -> None:
        """Pales the image, so that what is drawn on it is what one sees."""
        axes.add_patch(Rectangle((0, 0), self.side, self.side, facecolor="white", alpha=strength, edgecolor="none"))

    def show_through(self, axes: Axes, image_HWC: NDArray[np.uint8], patches: Sequence[int]) -> None:
        """Some patches of the image over whatever lies on it."""
        side = self.patch
        for x, y in map(self.corner, patches):
            axes.imshow(image_HWC[y : y + side, x : x + side], extent=(x, x + side, y + side, y), zorder=2)
        axes.set_xlim(0, self.side)
        axes.set_ylim(self.side, 0)
        axes.set_aspect("auto")

    def likeness(self, axes: Axes, similarity_L: NDArray[np.float32], low: float = 0.0, border: float = 0.7) -> None:
        """A heat map of similarities `low` … 1 in place of the image."""
        axes.imshow(
            similarity_L.reshape(self.grid, self.grid), extent=(0, self.side, self.side, 0), cmap=LIKENESS,
            vmin=low, vmax=1, aspect="auto", interpolation="nearest",
        )  # fmt: skip
        self.lines(axes, "white", border)

    def clusters(self, axes: Axes, cluster_L: Sequence[int], colours: Sequence[str], border: float = 0.7) -> None:
        """Tints the patches of each cluster; those of cluster -1 are in none."""
        for k, colour in enumerate(colours):
            members = [self.cell(index) for index, cluster in enumerate(cluster_L) if cluster == k]
            tint = PatchCollection(members, facecolor=colour, alpha=0.55, edgecolor="white", linewidth=border)
            axes.add_collection(tint)

    def outline(self, axes: Axes, anchors: Sequence[int], colours: Sequence[str], width: float = 2.0) -> None:
        """A frame in its colour around each anchor, on a white one."""
        for index, colour in zip(anchors, colours, strict=True):
            for edge, thickness, order in (("white", 1.7 * width, 3), (colour, width, 4)):
                axes.add_patch(
                    Rectangle(
                        self.corner(index), self.patch, self.patch, fill=False, edgecolor=edge, linewidth=thickness,
                        zorder=order,
                    )
                )  # fmt: skip
