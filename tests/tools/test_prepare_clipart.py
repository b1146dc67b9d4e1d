"""The embedded data set: how it is made, on drawings made here, and what was shipped."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import clipart_captions
import clipart_images
import prepare_clipart
from clipart_captions import Metadata
from clipart_categories import category

REPOSITORY = Path(__file__).parents[2]
CLIPART = REPOSITORY / "cmpt/data/clipart"
LIMIT_BYTES = 16_000_000

PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>"""


def svg(title: str, description: str = "", keywords: tuple[str, ...] = (), licence: str = PUBLIC_DOMAIN) -> bytes:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return SVG.format(
        title=title, description=description, keywords=items, creator="Ann Author", licence=licence
    ).encode()


def metadata(title: str, description: str = "", keywords: tuple[str, ...] = ()) -> Metadata:
    return clipart_captions.read_metadata(svg(title, description, keywords))


def drawing(seed: int, size: int = 200) -> Image.Image:
    """A few filled shapes on a transparent ground."""
    generator = random.Random(seed)
    picture = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = generator.randrange(size), generator.randrange(size)
        colour = (*(generator.randrange(200) for _ in range(3)), 255)
        pen.ellipse((x - 40, y - 30, x + 40, y + 30), fill=colour)
    return picture


def add(root: Path, path: str, picture: Image.Image, text: bytes) -> None:
    for kind, suffix in (("png", ".png"), ("svg", ".svg")):
        (root / kind / path).parent.mkdir(parents=True, exist_ok=True)
        file = (root / kind / path).with_name(Path(path).name + suffix)
        picture.save(file) if kind == "png" else file.write_bytes(text)


# Captions -----------------------------------------------------------------------------------------


def test_metadata_of_an_svg_are_read() -> None:
    read = clipart_captions.read_metadata(svg("Hen", "A hen.", ("bird", "farm")))
    assert read == Metadata("Hen", "A hen.", ("bird", "farm"), ("Ann Author",), PUBLIC_DOMAIN)


@pytest.mark.parametrize("text", [b"<svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_an_svg_without_metadata_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="SVG metadata"):
        clipart_captions.read_metadata(text)


@pytest.mark.parametrize(
    ("path", "title", "name"),
    [
        ("animals/birds/hen_01", "Hen", "Hen"),
        ("animals/bugs/bee1_mimooh_01", "bee1", "bee"),
        ("animals/mammals/contour_fox", "Clipart by Nicu Buculei - contour_chipmunk", "outline of a fox"),
        ("animals/horses/cavallo_architetto_franc_03", "Cavallo", "horse"),
        ("food/crawfish1_bw_ganson", "Crawfish (B and W)", "Crawfish, black and white"),
        ("computer/icons/flat-theme/action/2uparrow", "Part of the Flat Icon Collection (Wed)",
         "double up arrow icon, flat style"),
        ("recreation/games/cards/white/white_d_7", "card", "seven of diamonds playing card, white style"),
        ("signs_and_symbols/flags/africa/burkina_faso", "burkina_faso", "flag of Burkina Faso"),
        ("transportation/no_entry", "SVG Road Signs", "road sign: no entry"),
        ("signs_and_symbols/map_symbols/aiga_taxi_", "AIGA_Symbol_Signs", "pictogram: taxi"),
        ("unsorted/papera", "Various Cliparts", "duck"),
        ("people/t-shirt_02", "t-shirt", "t-shirt"),
    ],
)  # fmt: skip
def test_names_are_plain_english(path: str, title: str, name: str) -> None:
    assert clipart_captions.subject(path, metadata(title)) == name


@pytest.mark.parametrize(
    ("path", "title"),
    [("computer/icons/70a001", "gold-theme"), ("people/ann_author_01", "Ann Author"), ("unsorted/ms_01", "MS")],
)
def test_what_names_nothing_has_no_subject(path: str, title: str) -> None:
    assert clipart_captions.subject(path, metadata(title)) == ""


def test_first_caption_tells_most_and_none_repeats() -> None:
    read = metadata(
        "Wine Glass", "With a bit of wine in it. Made with Inkscape.", ("food", "hash(0x8a)", "drink", "wine", "party")
    )
    assert clipart_captions.make_captions("Wine Glass", read) == [
        "Wine Glass: With a bit of wine in it",
        "Wine Glass",
        "With a bit of wine in it",
        "Wine Glass, food, drink, party",
        "food, drink, party",
    ]


@pytest.mark.parametrize(
    "description", ["Created with Inkscape", "jean@example.com", "I drew this", "Hen", "http://example.org/hen"]
)
def test_descriptions_of_something_else_are_dropped(description: str) -> None:
    assert clipart_captions.make_captions("Hen", metadata("Hen", description)) == ["Hen"]


def test_an_unknown_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="path: got 'novelties/x'"):
        category("novelties/x", "x")


# Pictures -----------------------------------------------------------------------------------------


def test_drawing_fills_the_square_on_white() -> None:
    picture = Image.new("RGBA", (400, 400))
    ImageDraw.Draw(picture).rectangle((100, 150, 299, 249), fill=(255, 0, 0, 255))  # 200 x 100
    pixels = clipart_images.square_picture(picture)
    assert pixels is not None and pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8
    ink = pixels.min(axis=2) < 245
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert (columns[0], columns[-1]) == (2, 125)
    assert (rows[0], rows[-1]) == (33, 94)
    assert (pixels[0, 0] == 255).all() and (pixels[64, 64] == (255, 0, 0)).all()


@pytest.mark.parametrize("box", [None, (10, 10, 20, 20), (0, 0, 299, 5)])
def test_blank_tiny_and_elongated_drawings_are_refused(box: tuple[int, int, int, int] | None) -> None:
    picture = Image.new("RGBA", (300, 300))
    if box:
        ImageDraw.Draw(picture).rectangle(box, fill=(0, 0, 0, 255))
    assert clipart_images.square_picture(picture) is None


def squares(*pictures: Image.Image) -> list[np.ndarray]:
    made = [clipart_images.square_picture(picture) for picture in pictures]
    return [pixels for pixels in made if pixels is not None]


def test_copies_scalings_and_slight_changes_are_near_duplicates() -> None:
    original = drawing(1)
    larger = original.resize((500, 500), Image.Resampling.BICUBIC)
    touched = original.copy()
    ImageDraw.Draw(touched).point((100, 100), fill=(0, 0, 0, 255))
    prints = clipart_images.fingerprints(squares(original, drawing(2), original, larger, touched))
    limit = prepare_clipart.NEAR_DUPLICATE_DISTANCE
    assert clipart_images.near_duplicates(prints, ["a", "b", "c", "d", "e"], limit, 1.0) == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert clipart_images.near_duplicates(prints, ["a", "a", "c", "d", "e"], limit, 2.0) == [
        False,
        True,
        True,
        True,
        True,
    ]
    assert clipart_images.near_duplicates(prints, ["a", "b", "c", "d", "e"], -1.0, -1.0) == [False] * 5


def test_distance_is_that_of_the_definition() -> None:
    first, second = clipart_images.fingerprints(squares(drawing(1), drawing(2)))
    expected = np.linalg.norm(first - second) / max(np.linalg.norm(first), np.linalg.norm(second))
    assert clipart_images.distances(first[None], second[None])[0, 0] == pytest.approx(expected, rel=1e-12)
    assert clipart_images.distances(first[None], first[None])[0, 0] == 0


def test_jpegs_keep_to_their_budget_and_spend_it() -> None:
    candidates = [clipart_images.encode_candidates(pixels) for pixels in squares(*map(drawing, range(8)))]
    sizes = [[clipart_images.tar_blocks(len(jpeg)) * 512 for _, jpeg in options] for options in candidates]
    limit = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    chosen = clipart_images.choose_jpegs(candidates, limit)
    spent = sum(clipart_images.tar_blocks(len(jpeg)) * 512 for jpeg in chosen)
    assert limit - 8 * 2048 <= spent <= limit
    with pytest.raises(ValueError, match="limit 1000"):
        clipart_images.choose_jpegs(candidates, 1000)


# The whole tool, on a small library -----------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for number in range(40):
        folder = ("animals/birds", "food/fruit")[number % 2]
        word = f"{'abcdefghij'[number % 10]}{'klmn'[number // 10]}ulu"
        add(root, f"{folder}/{word}_01", drawing(number), svg(word, keywords=("thing",)))
    add(root, "tools/copy_01", drawing(0), svg("Copy of the first"))
    add(root, "tools/blank_01", Image.new("RGBA", (100, 100)), svg("Blank"))
    add(root, "tools/ann_author_01", drawing(100), svg("Ann Author"))
    add(root, "tools/gpl_01", drawing(102), svg("Firewall", licence="http://creativecommons.org/licenses/GPL/2.0/"))
    add(root, "shapes/stars/star_01", drawing(101), svg("gramastar"))
    (root / "png/tools/link_01.png").symlink_to(root / "png/tools/copy_01.png")
    return root


def test_library_is_filtered_with_every_cause_counted(library: Path) -> None:
    removed: Counter[str] = Counter()
    samples = prepare_clipart.drop_repetitions(prepare_clipart.read_library(library, removed), removed)
    assert len(samples) == 40
    assert removed == {
        "near-duplicate picture": 1,
        "blank, tiny or very elongated drawing": 1,
        "no usable caption (junk title and no telling file name)": 1,
        "series: 'gramastar' stars": 1,
        "licence other than the public domain in the drawing": 1,
        "link to another picture of the library": 1,
    }


def test_heldout_resembles_nothing_and_covers_the_categories(library: Path) -> None:
    samples = prepare_clipart.read_library(library, Counter())[:40]
    training, heldout = prepare_clipart.split_heldout(samples, count=10)
    assert len(training) == 30 and len(heldout) == 10
    assert {sample.category for sample in heldout} == {sample.category for sample in training}
    assert not {sample.captions[0] for sample in heldout} & {sample.captions[0] for sample in training}
    with pytest.raises(ValueError, match="held out"):
        prepare_clipart.split_heldout(samples, count=1000)


def test_same_library_gives_the_same_bytes(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_clipart, "HELDOUT_SAMPLES", 4)
    monkeypatch.setattr(prepare_clipart.split_heldout, "__defaults__", (4,))
    for name in ("first", "second"):
        prepare_clipart.build(library, tmp_path / name, [Path("p_1_all.deb")])
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    assert set(first) == {"README.md", "heldout-0000.tar", *(f"train-{shard:04d}.tar" for shard in range(8))}


# What was shipped -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shipped:
    key: str
    jpeg: bytes
    captions: list[str]
    category: str
    source: str
    json_length_bytes: int


def read_shards(pattern: str) -> list[Shipped]:
    samples = []
    for shard in sorted(CLIPART.glob(pattern)):
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            for image, text in zip(members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                assert text.name == f"{key}.json"
                assert (image.mtime, image.uid, image.gid, image.mode) == (0, 0, 0, 0o644)
                jpeg, record = archive.extractfile(image), archive.extractfile(text)
                assert jpeg is not None and record is not None
                fields = json.loads(record.read())
                samples.append(
                    Shipped(key, jpeg.read(), fields["captions"], fields["category"], fields["source"], text.size)
                )
    return samples


@pytest.fixture(scope="module")
def training() -> list[Shipped]:
    return read_shards("train-*.tar")


@pytest.fixture(scope="module")
def heldout() -> list[Shipped]:
    return read_shards("heldout-*.tar")


def pixels_of(sample: Shipped) -> np.ndarray:
    with Image.open(io.BytesIO(sample.jpeg)) as picture:
        assert picture.mode == "RGB" and picture.size == (128, 128), sample.key
        assert "progressive" not in picture.info, sample.key
        return np.asarray(picture)


def test_shipped_files_are_complete_and_small() -> None:
    names = {path.name for path in CLIPART.iterdir()}
    shards = {"heldout-0000.tar", *(f"train-{n:04d}.tar" for n in range(8))}
    assert names == {"README.md", "tokenizer.model", "word_counts.json"} | shards
    assert sum(path.stat().st_size for path in CLIPART.iterdir()) <= LIMIT_BYTES


def test_shipped_counts_are_those_of_the_readme(training: list[Shipped], heldout: list[Shipped]) -> None:
    readme = (CLIPART / "README.md").read_text(encoding="utf-8")
    assert len(heldout) == 500
    assert f"{len(training)} training pairs" in " ".join(readme.split())
    for name, count in Counter(sample.category for sample in training).items():
        held = sum(sample.category == name for sample in heldout)
        assert f"| {name} | {count} | {held} |" in readme


def test_shipped_checksums_hold() -> None:
    readme = (CLIPART / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^    ([0-9a-f]{64})  (\S+)$", readme, re.MULTILINE))
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in CLIPART.iterdir() if path.suffix != ".md"
    }
    assert listed == files


def test_no_shipped_key_twice_and_all_readable(training: list[Shipped], heldout: list[Shipped]) -> None:
    keys = [sample.key for sample in training + heldout]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[a-z0-9_-]+", key) for key in keys)


def test_shipped_captions_are_clean(training: list[Shipped], heldout: list[Shipped]) -> None:
    for sample in training + heldout:
        assert sample.captions, sample.key
        folded = [caption.casefold() for caption in sample.captions]
        assert len(set(folded)) == len(folded), sample.key
        for caption in sample.captions:
            assert caption == " ".join(caption.split()) and 1 <= len(caption.split()) <= 40, (sample.key, caption)
            assert re.search(r"[A-Za-z]", caption), (sample.key, caption)
            assert not re.search(r"rollandin|gramastar|flat icon collection|hash\(|https?:|@|&\w+;|_", caption, re.I), (
                sample.key,
                caption,
            )
        assert sample.source.endswith(".png")


def test_shipped_json_fits_one_tar_block(training: list[Shipped], heldout: list[Shipped]) -> None:
    assert max(sample.json_length_bytes for sample in training + heldout) <= 512


def test_shipped_categories_are_all_held_out(training: list[Shipped], heldout: list[Shipped]) -> None:
    counts = Counter(sample.category for sample in training + heldout)
    assert 15 <= len(counts) <= 40
    assert min(counts.values()) >= 10
    assert {sample.category for sample in heldout} == set(counts)


def test_heldout_first_captions_are_unique(training: list[Shipped], heldout: list[Shipped]) -> None:
    def words(caption: str) -> frozenset[str]:
        return frozenset(re.findall(r"[a-z0-9]+", caption.casefold()))

    first = [words(sample.captions[0]) for sample in heldout]
    assert len(set(first)) == len(first)
    assert not set(first) & {words(caption) for sample in training for caption in sample.captions}


def test_heldout_pictures_have_no_near_duplicate_in_training(training: list[Shipped], heldout: list[Shipped]) -> None:
    """By another measure than the tool's: the correlation of 16 x 16 colour thumbnails."""

    def thumbnails(samples: list[Shipped]) -> np.ndarray:
        pictures = np.stack([pixels_of(sample) for sample in samples]).astype(np.float32)
        small = pictures.reshape(-1, 16, 8, 16, 8, 3).mean(axis=(2, 4)).reshape(len(samples), -1)
        small -= small.mean(axis=1, keepdims=True)
        return small / np.linalg.norm(small, axis=1, keepdims=True)

    alike = thumbnails(heldout) @ thumbnails(training).T > 0.985
    pairs = [(heldout[row].key, training[column].key) for row, column in np.argwhere(alike)]
    assert not pairs


@pytest.mark.slow
def test_rebuilding_gives_the_shipped_bytes(tmp_path: Path) -> None:
    """Needs apt to reach a Debian mirror; the bytes also depend on Pillow's JPEG encoder."""
    readme = (CLIPART / "README.md").read_text(encoding="utf-8")
    pillow = re.search(r"Pillow (\S+)", readme)
    if pillow is None or pillow[1] != prepare_clipart.PIL.__version__:
        pytest.skip(f"shipped with Pillow {pillow and pillow[1]}, here is {prepare_clipart.PIL.__version__}")
    try:
        packages = prepare_clipart.download_packages(tmp_path / "packages")
    except (RuntimeError, FileNotFoundError) as error:
        pytest.skip(f"apt-get cannot download: {str(error).splitlines()[0]}")
    command = [
        sys.executable,
        REPOSITORY / "tools/prepare_clipart.py",
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path,
        *packages,
    ]
    subprocess.run(command, check=True)
    for shard in sorted(CLIPART.glob("*.tar")):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes(), shard.name
