import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmpt.monitor.pictures import HIDDEN_FILL, RIGHT, SCALE, mask_grid, query_grid

GENERATOR = np.random.default_rng(0)
IMAGES = np.repeat(np.repeat(GENERATOR.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), 8, axis=1), 8, axis=2)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def share_of(colour: str, png: bytes) -> float:
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return float((np.abs(pixels(png).astype(int) - rgb).max(axis=-1) <= 2).mean())


def test_mask_grid_greys_what_is_hidden_and_nothing_else() -> None:
    shares = []
    for hidden in (0, 16, 32, 64):
        keep = np.ones((8, 64), dtype=bool)
        keep[:, :hidden] = False
        shares.append(share_of(HIDDEN_FILL, mask_grid(IMAGES, keep, 8, "masks")))
    assert shares[0] < 0.001 < 0.03 < shares[1]
    np.testing.assert_allclose(np.array(shares[2:]) / shares[1], [2, 4], rtol=0.08)


@pytest.mark.parametrize(("count", "width"), [(8, 960), (4, 960), (3, 929), (1, 315), (6, 929)])
def test_mask_grid_has_the_size_of_its_layout(count: int, width: int) -> None:
    png = mask_grid(IMAGES[:count], np.ones((count, 64), dtype=bool), 8, "masks")
    height, got = pixels(png).shape[:2]
    assert got // SCALE == pytest.approx(width, abs=4) and 100 < height // SCALE < 500


def test_mask_grid_changes_with_its_input_only() -> None:
    keep = GENERATOR.random((8, 64)) > 0.5
    png = mask_grid(IMAGES, keep, 8, "masks")
    assert mask_grid(IMAGES, keep, 8, "masks") == png
    assert mask_grid(IMAGES, ~keep, 8, "masks") != png
    assert mask_grid(255 - IMAGES, keep, 8, "masks") != png
    assert mask_grid(IMAGES, keep, 8, "other") != png


def test_mask_grid_refuses_a_mask_of_another_grid() -> None:
    with pytest.raises(ValueError, match=r"expected \(8, 64\)"):
        mask_grid(IMAGES, np.ones((8, 49), dtype=bool), 8, "masks")


def grid_of(hits: np.ndarray, queries: list[str] | None = None, scores: float = 0.25) -> bytes:
    count, best = hits.shape
    images = IMAGES[GENERATOR.permutation(8)[:best]][None].repeat(count, axis=0)
    return query_grid(queries or ["a cat"] * count, images, hits, np.full(hits.shape, scores))


def test_query_grid_frames_each_right_image_in_green() -> None:
    none = np.zeros((3, 5), dtype=bool)
    one, three = none.copy(), none.copy()
    one[0, 0] = True
    three[[0, 1, 2], [0, 4, 2]] = True
    shares = [share_of(RIGHT, grid_of(hits)) for hits in (none, one, three)]
    assert shares[0] < 1e-5 < shares[1]
    assert shares[2] / shares[1] == pytest.approx(3, rel=0.15)


def test_query_grid_has_a_row_per_query() -> None:
    heights = [pixels(grid_of(np.zeros((count, 5), dtype=bool))).shape[0] for count in (1, 2, 4)]
    assert heights[2] - heights[1] == pytest.approx(2 * (heights[1] - heights[0]), abs=2 * SCALE)
    assert pixels(grid_of(np.zeros((1, 5), dtype=bool))).shape[1] == 960 * SCALE


@pytest.mark.parametrize("query", ["", "costs $5 or $x_2$ & <b>", "word " * 60, "x" * 300])
def test_query_grid_draws_any_caption(query: str) -> None:
    assert grid_of(np.zeros((1, 5), dtype=bool), [query]) != grid_of(np.zeros((1, 5), dtype=bool), ["a dog"])


def test_query_grid_refuses_arrays_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 queries"):
        query_grid(["a", "b"], IMAGES[None, :5], np.zeros((1, 5), dtype=bool), np.zeros((1, 5)))


def test_drawing_of_the_method_is_deterministic_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import draw_method

    for index in range(3):
        Image.fromarray(IMAGES[index]).save(tmp_path / f"{index}.png")
    options = [word for index in range(3) for word in ("--image", str(tmp_path / f"{index}.png"))]
    for name in ("first.png", "second.png"):
        monkeypatch.setattr("sys.argv", ["draw_method.py", str(tmp_path / name), *options])
        draw_method.main()
    content = (tmp_path / "first.png").read_bytes()
    assert content == (tmp_path / "second.png").read_bytes() and len(content) < 300_000
