"""What the way from tar shards to batches delivers per core, cmpt's and open_clip's side by side in one process:

    python tools/bench_loader.py [--images 512] [--rounds 7]

The data are made first: JPEG photographs of 512 x 384 pixels, quality 90, cut, mirrored and tinted from those of
scikit-image so that no two are alike, with captions in the manner of web pages'. Sides, in turns in every round:

    cmpt        cmpt's Loader: order, tar reading, checks, decoding, crop, resize, caption choice, tokenizing, packing
    open_clip   open_clip_train.data.get_wds_dataset with image_transform(is_train=True) and SimpleTokenizer, no workers
    raw         simplejpeg and torch's uint8 bicubic resize of the same crops, on bytes in memory: the ceiling

Before timing, both loaders must have given every caption once, as the same ids. A rate is images per second of
processor time of all threads, which other work on the machine disturbs least; "by the clock" is what the time that
passed gives, and is lower where the core was shared or had to wait. A ratio is the median over rounds of the ratios
within a round. open_clip's batches are normalised floats and padded ids, cmpt's are uint8 and packed: it normalises
where it masks (bench_masking.py).

Then what one image costs cmpt, place by place, and how many captions both tokenizers take. With --gpu only DALI, by
the clock: batches of the same images in memory, decoded and resized as decode.backend=dali does (in DALI's CPU mode
where there is no GPU).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: rates are per core

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench_photographs import captions_of, write_shards
from cmpt.batch import PackedText
from cmpt.data.decode import DecodedBatch, Encoded, Window, crop_draws, crop_window, decode_upright, train_pixels
from cmpt.data.loader import Loader
from cmpt.data.reader import ShardReader
from cmpt.data.samples import Sample, read_sample
from cmpt.data.shards import Shard, open_shards
from cmpt.data.tokenizer import Tokenizer, open_tokenizer, pack_captions
from cmpt.data.validate import DataError
from cmpt.recipe import schema
from with_open_clip import import_open_clip

CONTEXT_LENGTH = 77
IMAGE = schema.Image()  # 224 pixels, crops of 0.9 to 1 of the area: what open_clip's transform does by default too
SIDES = {
    "cmpt": "cmpt, the whole loader",
    "open_clip": "open_clip {version}, the whole pipeline",
    "raw": "raw: simplejpeg, crop, torch's resize",
}
RATIOS = (("cmpt", "open_clip", "at least 3x"), ("cmpt", "raw", "at least 0.85x"))
PACKAGES = ("torch", "simplejpeg", "open_clip_torch", "torchvision", "pillow", "webdataset", "tokenizers")
_POLL_S, _WORK_S, _REST_S = 0.005, 0.001, 0.1  # the loader rests when no poll finds work for so long
_CAPTIONS = 2000
_BOTH = "decode, crop and resize"
_IN_FLIGHT = 2  # batches that DALI works on at a time

Ids = tuple[int, ...]


class Spent(NamedTuple):
    """Seconds that a side took for all images."""

    clock: float
    processor: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="per round; whole batches (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that warms up")
    parser.add_argument("--workers", type=int, default=1, help="threads of cmpt and cores; the other sides have one")
    parser.add_argument("--folder", type=Path, help="where the shards are made and kept (default: a temporary one)")
    parser.add_argument("--gpu", action="store_true", help="DALI instead: images/s of decode.backend=dali by itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measured value there")
    options = parser.parse_args(arguments)
    for name in ("images", "batch_size", "rounds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.images % options.batch_size:
        parser.error(f"--images must be a multiple of --batch-size {options.batch_size}, got {options.images}")
    cores = sorted(os.sched_getaffinity(0))
    if options.workers > len(cores):
        parser.error(f"--workers must be at most {len(cores)}, the cores of this process, got {options.workers}")
    try:
        if not options.gpu:
            os.sched_setaffinity(0, cores[-options.workers :])
        with tempfile.TemporaryDirectory() as temporary:
            report(options, options.folder or Path(temporary))
    except (DataError, OSError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:
        os.sched_setaffinity(0, cores)
    return 0


def report(options: argparse.Namespace, folder: Path) -> None:
    shards = write_shards(folder, options.images)
    data = schema.Data([schema.Source([shards])], streams=1, workers=options.workers, prefetch_batches=2)
    data.cache_folder = str(folder / "cache")
    opened = open_shards(data.train[0].urls, data)
    samples = list(samples_of(opened, data))
    bytes_each = sum(len(sample.image) for sample in samples) / len(samples)
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    print(f"`python {' '.join(sys.argv)}`\n")
    print(f"{len(samples)} images of {bytes_each / 1000:.0f} kB, batches of {options.batch_size}, "
          f"Python {platform.python_version()}, {versions}\n")  # fmt: skip
    found: dict[str, object] = {"images": len(samples), "bytes_each": bytes_each}
    if options.gpu:
        found["dali"] = report_dali(options, samples)
    else:
        found |= report_sides(options, data, opened, samples, shards) | report_tokenizers(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def our_tokenizer() -> Tokenizer:
    return open_tokenizer(schema.Tokenizer("clip_bpe"), CONTEXT_LENGTH)


def installed(package: str) -> str:
    return version(package).partition("+")[0]


class CmptSide:
    """The loader, which goes on from round to round: at the end of each its queue is as full as at the beginning."""

    def __init__(self, options: argparse.Namespace, data: schema.Data, shards: list[Shard]) -> None:
        loader = Loader(data, IMAGE, shards=[shards], tokenizer=our_tokenizer(), context_length=CONTEXT_LENGTH, seed=0,
                        batch_size=options.batch_size, rank=0, world_size=1)  # fmt: skip
        self._count = options.images // options.batch_size
        self._batches = loader.batches(loader.initial_state())

    def __call__(self) -> list[PackedText]:
        found = []
        for _ in range(self._count):
            batch, _ = next(self._batches)
            assert batch.valid_B.all() and not batch.rejections
            found.append(batch.text)
        return found

    @staticmethod
    def ids(texts: list[PackedText]) -> list[Ids]:
        """Captions, in any order."""
        return [tuple(ids.tolist()) for text in texts for ids in text.ids_U.split(text.lengths)]

    def close(self) -> None:
        self._batches.close()


class OpenClipSide:
    """One epoch of open_clip's training data, in this process."""

    def __init__(self, options: argparse.Namespace, shards: str) -> None:
        open_clip = import_open_clip()
        args = SimpleNamespace(train_data=shards, train_num_samples=options.images, train_data_upsampling_factors=None,
                               dataset_resampled=False, batch_size=options.batch_size, workers=0, world_size=1,
                               seed=0)  # fmt: skip
        transform = open_clip.image_transform(IMAGE.size, is_train=True)
        tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
        module = import_open_clip_data()
        self._data = module.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
        self._end, self._epoch = tokenizer.eot_token_id, 0

    def __call__(self) -> list[Tensor]:
        self._data.set_epoch(self._epoch)
        self._epoch += 1
        return [text_BT for _, text_BT in self._data.dataloader]

    def ids(self, texts: list[Tensor]) -> list[Ids]:
        """Captions without their padding."""
        return [tuple(row[: row.index(self._end) + 1]) for row in torch.cat(texts).tolist()]


def import_open_clip_data() -> ModuleType:
    """open_clip_train.data, for webdataset 1 and without pandas, which it names for its CSV data sets only."""
    lacks_pandas = importlib.util.find_spec("pandas") is None
    importlib.import_module("webdataset")  # and what else asks whether there is a pandas, before the empty one is there
    import_open_clip()
    if lacks_pandas:
        sys.modules["pandas"] = ModuleType("pandas")
    try:
        module: Any = importlib.import_module("open_clip_train.data")
    finally:
        if lacks_pandas:
            del sys.modules["pandas"]
    # Since 1.0 an empty record stands at the end of a shard by default, which open_clip 3.3.0 does not expect.
    module.tar_file_expander = partial(
        importlib.import_module("webdataset.tariterators").tar_file_expander, eof_value=None
    )
    return module


class RawSide:
    """What the two libraries need for the pixels alone, with crop windows drawn beforehand."""

    def __init__(self, samples: list[Sample]) -> None:
        draws_BK = crop_draws(0, np.arange(len(samples)))
        self._work: list[tuple[bytes, Window]] = [
            (sample.image, crop_window(draws, sample.header.height, sample.header.width, IMAGE))
            for sample, draws in zip(samples, draws_BK, strict=True)
        ]

    def __call__(self) -> None:
        size = (IMAGE.size, IMAGE.size)
        for data, (top, left, height, width, _) in self._work:
            pixels_HWC = simplejpeg.decode_jpeg(data)
            crop_HWC = np.ascontiguousarray(pixels_HWC[top : top + height, left : left + width])
            interpolate(torch.from_numpy(crop_HWC).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)


def samples_of(shards: list[Shard], data: schema.Data) -> Iterator[Sample]:
    """Every sample, read and checked."""
    reader = ShardReader(len(shards))
    for shard in shards:
        for place in range(shard.count):
            yield read_sample(reader, shard, reader.members(shard, place), data)


def timed(call: Callable[[], object]) -> Spent:
    """What a call takes; for the loader until its threads rest, which leaves it as it was found."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    end, busy = time.perf_counter(), time.process_time()
    if isinstance(call, CmptSide):
        now = busy
        while time.perf_counter() - end < _REST_S:
            time.sleep(_POLL_S)
            before, now = now, time.process_time()
            if now - before > _WORK_S:  # more than looking takes
                end, busy = time.perf_counter(), now
    return Spent(end - clock, busy - processor)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Spent]]:
    """What every call takes in every round; the order rotates. The calls have warmed up."""
    spent: dict[str, list[Spent]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            spent[name].append(timed(calls[name]))
        order.append(order.pop(0))
    return spent


def ratios(spent: dict[str, list[Spent]], fast: str, slow: str) -> list[float]:
    return [b.processor / a.processor for a, b in zip(spent[fast], spent[slow], strict=True)]


def report_sides(
    options: argparse.Namespace, data: schema.Data, opened: list[Shard], samples: list[Sample], shards: str
) -> dict[str, object]:
    cmpt, open_clip = CmptSide(options, data, opened), OpenClipSide(options, shards)
    calls: dict[str, Callable[[], object]] = {"cmpt": cmpt, "open_clip": open_clip, "raw": RawSide(samples)}
    places = places_of(options, data, opened, samples)
    try:
        check_captions(cmpt.ids(cmpt()), open_clip.ids(open_clip()))
        timed(cmpt)  # until its queue is full
        for call in (calls["raw"], *places.values()):
            call()
        spent = in_turns(calls | places, options.rounds)
    finally:
        cmpt.close()
    images = len(samples)
    print(f"Median of {options.rounds} rounds (lowest to highest).\n")
    print("| | images/s per core | by the clock |\n|-|-:|-:|")
    for side, title in SIDES.items():
        rates = [span([images / getattr(s, kind) for s in spent[side]]) for kind in ("processor", "clock")]
        print(f"| {title.format(version=installed('open_clip_torch'))} | {rates[0]} | {rates[1]} |")
    print("\n| ratio | | aim |\n|-|-:|-|")
    for fast, slow, aim in RATIOS:
        print(f"| {fast} / {slow} | {span(ratios(spent, fast, slow), 2)} | {aim} |")
    micros = {name: [1e6 * s.processor / images for s in times] for name, times in spent.items()}
    micros["crop and resize"] = [both - alone for both, alone in zip(micros.pop(_BOTH), micros["decode"], strict=True)]
    parts = ("read and check", "decode", "crop and resize", "tokenize and pack")
    micros["order, threads and the rest"] = [
        whole - sum(others) for whole, *others in zip(micros["cmpt"], *(micros[part] for part in parts), strict=True)
    ]
    print("\n| one image in cmpt | µs |\n|-|-:|")
    for place in (*parts, "order, threads and the rest"):
        print(f"| {place} | {span(micros[place])} |")
    return {"rounds": {name: [s._asdict() for s in times] for name, times in spent.items()}}


def check_captions(ours: list[Ids], theirs: list[Ids]) -> None:
    """Both sides saw every image once, if their captions are the same: no two images share one."""
    assert len(set(ours)) == len(ours), "cmpt gave a caption twice"
    assert sorted(ours) == sorted(theirs), "the sides gave different captions"


def places_of(
    options: argparse.Namespace, data: schema.Data, opened: list[Shard], samples: list[Sample]
) -> dict[str, Callable[[], object]]:
    """The parts of cmpt's work on all images, each by itself."""
    tokenizer = our_tokenizer()
    draws_BK = crop_draws(0, np.arange(len(samples)))
    pixels_BCHW = np.empty((options.batch_size, 3, IMAGE.size, IMAGE.size), dtype=np.uint8)

    def decode() -> None:
        for sample in samples:
            decode_upright(sample.image, sample.header)

    def decode_and_resize() -> None:
        for row, (sample, draws) in enumerate(zip(samples, draws_BK, strict=True)):
            train_pixels(sample.image, sample.header, draws, IMAGE, pixels_BCHW[row % options.batch_size])

    def tokenize() -> None:
        for start in range(0, len(samples), options.batch_size):
            pack_captions([tokenizer.encode(s.captions[0]) for s in samples[start : start + options.batch_size]])

    return {
        "read and check": lambda: sum(1 for _ in samples_of(opened, data)),
        "decode": decode,
        _BOTH: decode_and_resize,
        "tokenize and pack": tokenize,
    }


def report_tokenizers(options: argparse.Namespace) -> dict[str, object]:
    captions = captions_of(_CAPTIONS)
    ours = our_tokenizer()
    theirs = import_open_clip().SimpleTokenizer(context_length=CONTEXT_LENGTH)
    for caption, row in zip(captions, theirs(captions).tolist(), strict=True):
        ids = ours.encode(caption)
        assert ids == row[: len(ids)] and not any(row[len(ids) :]), f"the tokenizers differ on {caption!r}"
    calls: dict[str, Callable[[], object]] = {
        "cmpt": lambda: [ours.encode(caption) for caption in captions],
        "open_clip": lambda: [theirs(caption)[0] for caption in captions],
    }
    spent = in_turns(calls, options.rounds)
    print("\n| the same ids from | captions/s per core |\n|-|-:|")
    for side, title in (("cmpt", "cmpt's tokenizer (clip_bpe)"), ("open_clip", "open_clip's SimpleTokenizer")):
        print(f"| {title} | {span([len(captions) / s.processor for s in spent[side]])} |")
    print(f"| cmpt / open_clip | {span(ratios(spent, 'cmpt', 'open_clip'), 2)} |")
    return {"tokenizers": {name: [s._asdict() for s in times] for name, times in spent.items()}}


def report_dali(options: argparse.Namespace, samples: list[Sample]) -> list[float]:
    """Images per second of every round, by the clock."""
    from cmpt.data.dali import DaliDecoder, dali_installed

    if not dali_installed():
        raise DataError("--gpu needs DALI: pip install nvidia-dali-cuda130")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = DaliDecoder(IMAGE, options.batch_size, schema.Decode("dali"), device, in_flight=_IN_FLIGHT)
    draws_BK = crop_draws(0, np.arange(len(samples)))
    encoded = [Encoded(s.image, s.header, draws) for s, draws in zip(samples, draws_BK, strict=True)]
    batches = [encoded[start : start + options.batch_size] for start in range(0, len(encoded), options.batch_size)]
    rates = []
    with ThreadPoolExecutor(options.workers) as pool:
        for number in range(1 + options.rounds):
            began = time.perf_counter()
            begun: deque[Callable[[], DecodedBatch]] = deque()
            for batch in [*batches, *[None] * _IN_FLIGHT]:
                if len(begun) == _IN_FLIGHT or (begun and batch is None):
                    assert not begun.popleft()().refused
                if batch is not None:
                    begun.append(decoder.begin(batch, pool))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                rates.append(len(samples) / (time.perf_counter() - began))
    decoder.close()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    dali = importlib.import_module("nvidia.dali").__version__
    print(f"| DALI {dali} on {name} | images/s by the clock |\n|-|-:|")
    print(f"| decode, crop and resize, batches of {options.batch_size} | {span(rates)} |")
    return rates


def span(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
