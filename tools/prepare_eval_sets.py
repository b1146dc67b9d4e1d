"""Make small evaluation sets of the embedded clip art, in the formats in which others publish theirs.

Four folders below --out: wds_clipart (classes; splits test and train) and wds_clipart_captions (several
captions per picture) as CLIP_benchmark lays out webdataset folders, folder_clipart (a folder per
class), clipart_composition (questions as in SugarCrepe). Tests are made of the 500 held-out pairs, the
train split of training shards. The same bytes on every run; recipes/eval/clipart.yaml names them all.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import webdataset

from clipart_questions import Picture, make_questions
from cmpt.data.eval_sets import CLASSNAMES, TEMPLATES, TYPE
from cmpt.recipe.paths import PACKAGE

CLIPART = PACKAGE / "data" / "clipart"
PROMPTS = ("{c}", "a picture of {c}", "clip art of {c}")
TRAIN_SHARDS = 2
SAMPLES_PER_SHARD = 200


def read_pictures(shards: Sequence[Path]) -> list[Picture]:
    """All pairs of webdataset shards, in their order."""
    dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    pictures = []
    for sample in dataset:
        fields = json.loads(sample["json"])
        pictures.append(Picture(sample["__key__"], sample["jpg"], fields["captions"], fields["category"]))
    return pictures


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_split(folder: Path, samples: Sequence[dict[str, object]]) -> None:
    """0.tar, 1.tar, ... and their number."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0, mtime=0.0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"s{number:07d}", **sample})
        shards = writer.shard
    write_lines(folder / "nshards.txt", [str(shards)])


def write_classes(folder: Path, splits: dict[str, list[Picture]]) -> str:
    """Pictures and the number of their category."""
    classes = sorted({picture.category for picture in splits["test"]})
    for split, pictures in splits.items():
        write_split(folder / split, [{"jpg": p.jpeg, "cls": classes.index(p.category)} for p in pictures])
    write_lines(folder / CLASSNAMES, classes)
    write_lines(folder / TEMPLATES, PROMPTS)
    write_lines(folder / TYPE, ["classification"])
    sizes = ", ".join(f"{len(pictures)} {split}" for split, pictures in splits.items())
    return f"{len(classes)} classes, {sizes}"


def write_captions(folder: Path, pictures: Sequence[Picture]) -> str:
    """Pictures and those of their captions that no other picture has: what two have finds neither."""
    counts = Counter(caption.casefold() for picture in pictures for caption in set(picture.captions))
    own = [[caption for caption in picture.captions if counts[caption.casefold()] == 1] for picture in pictures]
    write_split(folder / "test", [{"jpg": p.jpeg, "txt": "\n".join(own[n])} for n, p in enumerate(pictures)])
    write_lines(folder / TYPE, ["retrieval"])
    return f"{len(pictures)} pictures, {sum(map(len, own))} captions"


def write_class_folders(folder: Path, pictures: Sequence[Picture]) -> str:
    for picture in pictures:
        place = folder / "test" / picture.category
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{picture.key}.jpg").write_bytes(picture.jpeg)
    write_lines(folder / TEMPLATES, PROMPTS)
    return f"{len(pictures)} pictures in {len(list((folder / 'test').iterdir()))} class folders"


def write_questions(folder: Path, pictures: Sequence[Picture]) -> str:
    (folder / "images").mkdir(parents=True)
    told = []
    for category, questions in make_questions(pictures).items():
        rows = {}
        for number, (picture, negative) in enumerate(questions):
            filename = f"{picture.key}.jpg"
            (folder / "images" / filename).write_bytes(picture.jpeg)
            rows[str(number)] = {
                "filename": filename,
                "caption": picture.captions[0],
                "negative_caption": negative,
            }
        text = json.dumps(rows, ensure_ascii=False, indent=4) + "\n"
        (folder / f"{category}.json").write_text(text, encoding="utf-8")
        told.append(f"{len(rows)} {category}")
    return "questions: " + ", ".join(told)


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) for root in (a, b)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(a, b, names[0], shallow=False)[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/eval_sets"), help="folder (default: %(default)s)")
    out = parser.parse_args(arguments).out
    heldout = read_pictures([CLIPART / "heldout-0000.tar"])
    train = read_pictures([CLIPART / f"train-{number:04d}.tar" for number in range(TRAIN_SHARDS)])
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as making:
            new = Path(making)
            told = {
                "wds_clipart": write_classes(new / "wds_clipart", {"test": heldout, "train": train}),
                "wds_clipart_captions": write_captions(new / "wds_clipart_captions", heldout),
                "folder_clipart": write_class_folders(new / "folder_clipart", heldout),
                "clipart_composition": write_questions(new / "clipart_composition", heldout),
            }
            there = {name: same_files(out / name, new / name) for name in told if (out / name).exists()}
            for name, same in there.items():
                if not same:
                    print(f"{out / name}: holds something else; remove it, or give another --out", file=sys.stderr)
                    return 1
            for name in told.keys() - there.keys():
                shutil.move(new / name, out / name)
    except OSError as error:
        print(f"{out}: {error}", file=sys.stderr)
        return 1
    for name, what in told.items():
        print(f"{out / name}: {what}" + (" (was there)" if name in there else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
