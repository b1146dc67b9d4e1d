"""Build the embedded image-text data set from the Open Clip Art Library.

Takes the Debian packages openclipart-png and openclipart-svg (public domain), pairs every PNG
with the metadata of its SVG twin, throws out what is unfit, and writes webdataset shards with
128 x 128 JPEGs and their captions: `train-{0000..NNNN}.tar` and `heldout-0000.tar`, together with
a README that counts what was removed and why. The same packages give the same bytes on every run.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

from clipart_captions import make_captions, read_metadata, subject
from clipart_categories import category
from clipart_images import (
    TAR_BLOCK_BYTES,
    Pixels,
    choose_jpegs,
    distances,
    encode_candidates,
    fingerprints,
    near_duplicates,
    square_picture,
    tar_blocks,
)
from clipart_readme import write_checksums, write_readme

PACKAGES = ("openclipart-png", "openclipart-svg")
NEAR_DUPLICATE_DISTANCE = 0.08
"""Relative distance of two fingerprints (see `distances`) up to which one of the two is removed."""
SAME_NAME_DISTANCE = 0.2
"""The same for two pictures of the same name; flags and playing cards of other names are closer than that."""
HELDOUT_DISTANCE = 0.28
"""Held-out pictures are farther than this from every training picture."""
MAX_SOURCE_PIXELS = 300_000_000
MAX_SAME_CAPTION = 6
"""Pictures with one and the same main caption beyond this number are removed as a series."""
HELDOUT_SAMPLES = 500
TRAIN_SHARDS = 8
SHARDS_LIMIT_BYTES = 15_650_000
"""All shards together; leaves room for tokenizer and README under 16 MB."""
MAX_JSON_BYTES = TAR_BLOCK_BYTES

_MISSING_PART = "rendered without a picture that it links to"
_SKIPPED = {
    "shapes/stars/": "series: 'gramastar' stars",
    "shapes/flowchart/": "series: flowchart shapes",
    "special/gradients/": "series: gradients",
    "special/gradient-": "series: gradients",
    "people/stripper": "unsuitable for a general audience",
    "people/sexy_lady": "unsuitable for a general audience",
    "decorations/sunwheel": "unsuitable for a general audience",
    "animals/birds/duck_yellow_ii": _MISSING_PART,
    "animals/birds/penguin/tux_didier": _MISSING_PART,
    "people/stylized_yoga_person": _MISSING_PART,
    "recreation/religion/creation_day_7": _MISSING_PART,
    "signs_and_symbols/clouds_jon_phillips_04": _MISSING_PART,
    "signs_and_symbols/clouds_jon_phillips_05": _MISSING_PART,
    "signs_and_symbols/clouds_jon_phillips_06": _MISSING_PART,
    "signs_and_symbols/weather/tsunami": _MISSING_PART,
    "signs_and_symbols/mpcad_box": "blank, tiny or very elongated drawing",
}
"""Start of a path -> why the drawings there are left out."""


@dataclass(frozen=True)
class Sample:
    """One picture with its captions."""

    key: str
    source: str
    category: str
    captions: tuple[str, ...]
    pixels: Pixels


# Packages ---------------------------------------------------------------------------------------


def download_packages(folder: Path) -> list[Path]:
    """Fetch the Debian packages with `apt-get download`; raises RuntimeError if apt cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", *PACKAGES]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed (apt-get update first?):\n{result.stderr}")
    return sorted(folder.glob("openclipart-*.deb"))


def package_name(package: Path) -> str:
    """Name and version of a .deb file, such as `openclipart-png_1:0.18+dfsg-19`."""
    return package.stem.replace("%3a", ":").removesuffix("_all")


def unpack_packages(packages: Iterable[Path], folder: Path) -> Path:
    """Unpack .deb files into `folder`; the library's root, which holds `png/` and `svg/`."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    root = folder / "usr/share/openclipart"
    for part in ("png", "svg"):
        if not (root / part).is_dir():
            raise ValueError(f"packages: no {part}/ in what they unpack to, expected {PACKAGES}")
    return root


# Selection --------------------------------------------------------------------------------------


def sample_key(source: str) -> str:
    """A webdataset key (no dots, no slashes) from the path of a picture."""
    stem = re.sub(r"-$", "-minus", source.removesuffix(".png").casefold()).replace("+", "-plus")
    return re.sub(r"[^a-z0-9_]+", "-", stem).strip("-_")


def _rank(text: str) -> str:
    """A fixed pseudo-random order that depends on nothing but the text."""
    return hashlib.sha256(text.encode()).hexdigest()


def caption_identity(caption: str) -> str:
    """What two captions must share to count as the same: their words, in any order."""
    return " ".join(sorted(set(re.findall(r"[a-z0-9]+", caption.casefold()))))


def fitting_captions(captions: Sequence[str], category: str, source: str) -> tuple[tuple[str, ...], bytes]:
    """As many captions as keep the sample's JSON within one tar block, and that JSON."""
    for count in range(len(captions), 0, -1):
        record = {"captions": list(captions[:count]), "category": category, "source": source}
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= MAX_JSON_BYTES or count == 1:
            return tuple(captions[:count]), text
    raise ValueError(f"captions: got none for {source!r}, expected at least one")


def read_library(root: Path, removed: Counter[str]) -> list[Sample]:
    """All usable pairs under `root` (which holds png/ and svg/), in the order of their paths.

    Counts what is left out in `removed`, by cause.
    """
    samples: list[Sample] = []
    keys: set[str] = set()
    Image.MAX_IMAGE_PIXELS = None  # the library's maps are large, and it is a trusted source
    paths = sorted((root / "png").rglob("*.png"), key=lambda path: path.as_posix())
    for number, path in enumerate(paths):
        if number % 500 == 0:
            print(f"  {number:5d} of {len(paths)} files", file=sys.stderr, flush=True)
        if path.is_symlink() or not path.is_file():
            removed["link to another picture of the library"] += 1
            continue
        source = path.relative_to(root / "png").as_posix()
        cause = next((why for start, why in _SKIPPED.items() if source.startswith(start)), "")
        if cause:
            removed[cause] += 1
            continue
        twin = (root / "svg" / source).with_suffix(".svg")
        if not twin.is_file():
            removed["no SVG twin with metadata"] += 1
            continue
        metadata = read_metadata(twin.read_bytes())
        if metadata.licence and not re.search(r"/public-?domain", metadata.licence, re.IGNORECASE):
            removed["licence other than the public domain in the drawing"] += 1
            continue
        name = subject(source.removesuffix(".png"), metadata)
        if not name:
            removed["no usable caption (junk title and no telling file name)"] += 1
            continue
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_SOURCE_PIXELS:
                removed["PNG of more than 300 megapixels"] += 1
                continue
            pixels = square_picture(picture)
        if pixels is None:
            removed["blank, tiny or very elongated drawing"] += 1
            continue
        key = sample_key(source)
        if key in keys:
            raise ValueError(f"key: {key!r} comes from two files, the second is {source!r}")
        keys.add(key)
        kind = category(source, name)
        captions, _ = fitting_captions(make_captions(name, metadata), kind, source)
        samples.append(Sample(key, source, kind, captions, pixels))
    return samples


def drop_repetitions(samples: list[Sample], removed: Counter[str]) -> list[Sample]:
    """Without near-duplicate pictures and without the tail of long series of one caption."""
    prints = fingerprints([sample.pixels for sample in samples])
    identities = [caption_identity(sample.captions[0]) for sample in samples]
    names = [caption_identity(re.sub(r", \w+ style$", "", sample.captions[0])) for sample in samples]
    repeated = near_duplicates(prints, names, NEAR_DUPLICATE_DISTANCE, SAME_NAME_DISTANCE)
    kept = []
    seen: Counter[str] = Counter()
    for sample, identity, is_repeated in zip(samples, identities, repeated, strict=True):
        if is_repeated:
            removed["near-duplicate picture"] += 1
        elif seen[identity] >= MAX_SAME_CAPTION:
            removed[f"series: more than {MAX_SAME_CAPTION} with the same caption"] += 1
        else:
            seen[identity] += 1
            kept.append(sample)
    return kept


def split_heldout(samples: list[Sample], count: int = HELDOUT_SAMPLES) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): `count` pairs that resemble no other sample, from every category.

    Candidates have a main caption that no other sample has among its captions, and a picture
    farther than HELDOUT_DISTANCE from all others. Each category gives a share in proportion to
    its size, and at least one. Raises ValueError where the candidates do not suffice.
    """
    prints = fingerprints([sample.pixels for sample in samples])
    uses: Counter[str] = Counter()
    for sample in samples:
        uses.update({caption_identity(caption) for caption in sample.captions})
    candidates: dict[str, list[int]] = defaultdict(list)
    for start in range(0, len(samples), 512):
        block = distances(prints[start : start + 512], prints)
        for row in range(len(block)):
            index = start + row
            block[row, index] = np.inf
            unique = uses[caption_identity(samples[index].captions[0])] == 1
            if unique and block[row].min() > HELDOUT_DISTANCE:
                candidates[samples[index].category].append(index)
    sizes = Counter(sample.category for sample in samples)
    chosen: list[int] = []
    spare: list[int] = []
    for name in sorted(sizes):
        ordered = sorted(candidates[name], key=lambda index: _rank(samples[index].key))
        share = max(1, count * sizes[name] // len(samples))
        if not ordered:
            raise ValueError(f"held out: no candidate in category {name!r}, expected one at least")
        chosen += ordered[:share]
        spare += ordered[share:]
    spare.sort(key=lambda index: _rank(samples[index].key))
    chosen = (sorted(chosen, key=lambda index: _rank(samples[index].key)) + spare)[:count]
    if len(chosen) < count:
        raise ValueError(f"held out: {len(chosen)} candidates in all, expected at least {count}")
    held = set(chosen)
    training = [sample for index, sample in enumerate(samples) if index not in held]
    return training, [samples[index] for index in chosen]


# Shards -----------------------------------------------------------------------------------------


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A plain USTAR archive without anything of time or machine in it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.mode = len(data), 0, 0o644
            archive.addfile(header, io.BytesIO(data))


def write_shards(training: list[Sample], heldout: list[Sample], folder: Path) -> None:
    """`train-NNNN.tar` (samples in a fixed mixed order) and `heldout-0000.tar` in `folder`."""
    training = sorted(training, key=lambda sample: _rank("order " + sample.key))
    samples = training + heldout
    records = [fitting_captions(sample.captions, sample.category, sample.source)[1] for sample in samples]
    record_blocks = sum(2 + tar_blocks(len(record)) for record in records)  # two headers per sample
    ends = (TRAIN_SHARDS + 1) * 2 * tarfile.RECORDSIZE
    limit = SHARDS_LIMIT_BYTES - ends - record_blocks * TAR_BLOCK_BYTES
    print(f"  encoding {len(samples)} pictures", file=sys.stderr, flush=True)
    jpegs = choose_jpegs([encode_candidates(sample.pixels) for sample in samples], limit)
    members = [
        ((f"{sample.key}.jpg", jpeg), (f"{sample.key}.json", record))
        for sample, jpeg, record in zip(samples, jpegs, records, strict=True)
    ]
    per_shard = -(-len(training) // TRAIN_SHARDS)
    for shard in range(TRAIN_SHARDS):
        part = members[shard * per_shard : min((shard + 1) * per_shard, len(training))]
        write_shard(folder / f"train-{shard:04d}.tar", (m for pair in part for m in pair))
    write_shard(folder / "heldout-0000.tar", (m for pair in members[len(training) :] for m in pair))


# Command line -----------------------------------------------------------------------------------


def build(root: Path, folder: Path, packages: Sequence[Path]) -> None:
    """Read the library at `root` and write shards and README to `folder`, all at once at the end."""
    removed: Counter[str] = Counter()
    samples = drop_repetitions(read_library(root, removed), removed)
    training, heldout = split_heldout(samples)
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write_shards(training, heldout, beside)
    write_readme(
        beside,
        Counter(sample.category for sample in training),
        Counter(sample.category for sample in heldout),
        removed,
        {
            "packages": ", ".join(f"`{package_name(package)}`" for package in packages),
            "shards": TRAIN_SHARDS,
            "last": f"{TRAIN_SHARDS - 1:04d}",
            "heldout_distance": HELDOUT_DISTANCE,
            "duplicate_distance": f"{NEAR_DUPLICATE_DISTANCE}, or {SAME_NAME_DISTANCE} for pictures of the same name",
            "pillow": PIL.__version__,
            "libjpeg": features.version("libjpeg_turbo"),
            "numpy": np.__version__,
            "sentencepiece": version("sentencepiece"),
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(beside.iterdir()):
        path.replace(folder / path.name)
    beside.rmdir()
    write_checksums(folder)
    for cause, count in removed.most_common():
        print(f"{count:6d}  {cause}")
    print(f"{len(training):6d}  training pairs")
    print(f"{len(heldout):6d}  held-out pairs")


def main() -> None:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("debs", nargs="*", type=Path, metavar="DEB",
                        help="the two packages, if already here (else: apt-get download)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for shards and README.md")
    parser.add_argument("--work", type=Path, default=Path("clipart-work"),
                        help="folder for packages and unpacked files, about 1 GB "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--checksums-only", action="store_true",
                        help="only bring the checksums in the README of --out up to date")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.checksums_only:
        write_checksums(arguments.out)
        return
    packages = arguments.debs or download_packages(arguments.work)
    root = unpack_packages(packages, arguments.work / "unpacked")
    build(root, arguments.out, sorted(packages))


if __name__ == "__main__":
    main()
