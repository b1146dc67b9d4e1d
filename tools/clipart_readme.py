"""README.md of the embedded clip art data set: source, format, counts and checksums."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

_README = """# The embedded data set: {pairs} clip art pictures with captions

Made by `tools/prepare_clipart.py`, which also wrote this page. Small enough to travel with the
code, real enough to learn from: {train} training pairs in {shards} shards and {heldout} held-out
pairs, {size} bytes in all.

## Source and licence

The pictures are those of the Open Clip Art Library, release 0.18, as Debian packages it:
{packages}. The copyright file of both packages
gives the *Creative Commons Public Domain Dedication*: the contributors certify that the work is in
the public domain, or dedicate it to the public domain, so anyone may copy, modify, use and exploit
it for any purpose, commercial or non-commercial. The library took only such works, and nearly all
drawings name the dedication in their own metadata (a few name no licence; those that name another
one were left out). The captions are made from the titles, descriptions and keywords in these
metadata; titles in other languages were translated by hand (`tools/clipart_translations.py`).

## Format

Webdataset tars. `KEY.jpg`: baseline JPEG, RGB, 128 x 128, the whole drawing on white. `KEY.json`:
`captions` (a list of distinct English captions, the most descriptive first; retrieval uses the
first), `category`, `source` (path of the PNG in the library). The held-out pairs have a first
caption that no other sample has among its captions, and a picture farther than {heldout_distance} from every
other. Distances are those of 32 x 32 colour thumbnails, relative to their ink
(`clipart_images.distances`); near-duplicates were removed up to a distance of {duplicate_distance}.

## Rebuild

    apt-get update
    python tools/prepare_clipart.py --out cmpt/data/clipart --work /tmp/clipart
    python tools/train_tokenizer.py 'cmpt/data/clipart/train-{{0000..{last}}}.tar' \\
        --out cmpt/data/clipart/tokenizer.model --vocab-size 3584
    python tools/count_words.py recipes/quickstart.yaml --output cmpt/data/clipart/word_counts.json
    python tools/prepare_clipart.py --out cmpt/data/clipart --checksums-only

The same packages give the same bytes: two runs with Pillow 13.0.0 did. Another JPEG encoder gives
equivalent pictures in other bytes. The files here were made with Pillow {pillow} (libjpeg-turbo
{libjpeg}), numpy {numpy} and sentencepiece {sentencepiece}. The quality of each JPEG is chosen so
that the total error is least for the size of the whole (`clipart_images.choose_jpegs`).

The tokenizer, `tokenizer.model`, is a sentencepiece unigram model of 3584 pieces, not far below
the most that these captions support. `word_counts.json` says how often each word of the training
captions occurs, for text masking by frequency.

## What was removed

Of {files} PNG files:

| files | cause |
|---:|---|
{removed}
| {pairs} | kept |

## Categories

| category | training | held out |
|---|---:|---:|
{categories}
"""

_CHECKSUMS_TITLE = "## Checksums (sha256)"


def write_readme(
    folder: Path, in_train: Counter[str], in_heldout: Counter[str], removed: Counter[str], facts: Mapping[str, object]
) -> None:
    """Write README.md to `folder`, which holds the shards, without checksums (see `write_checksums`).

    `in_train` and `in_heldout` count the samples per category, `removed` the files per cause;
    `facts` gives what else the template asks for.
    """
    pairs = in_train.total() + in_heldout.total()
    text = _README.format(
        pairs=pairs,
        train=in_train.total(),
        heldout=in_heldout.total(),
        size=sum(path.stat().st_size for path in folder.glob("*.tar")),
        files=pairs + removed.total(),
        removed="\n".join(f"| {count} | {cause} |" for cause, count in removed.most_common()),
        categories="\n".join(f"| {name} | {in_train[name]} | {in_heldout[name]} |" for name in sorted(in_train)),
        **facts,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Put the sha256 of every file in `folder` at the end of its README.md."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8").split(_CHECKSUMS_TITLE)[0].rstrip()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".model", ".json"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    sums = "\n".join(f"    {line}" for line in lines)
    readme.write_text(f"{text}\n\n{_CHECKSUMS_TITLE}\n\n{sums}\n")
