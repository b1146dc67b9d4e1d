"""Count the words of a recipe's training captions, for text_masking.strategy = frequency.

    python tools/count_words.py RECIPE [key=value ...] [--output FILE] [--least-count N]

Every shard of data.train is counted once, whatever its source's weight; of a sample with several captions, each of
them. Only captions are read: one of a picture that training will refuse counts too. A caption that cannot be used
counts nowhere but under its cause, in the last lines. Memory is that of the distinct words, about 150 bytes each:
--least-count makes the table smaller, not the counting.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

# Each of the processes imports torch with cmpt.data, but computes nothing with it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from cmpt.data.reader import ShardReader
from cmpt.data.samples import read_captions
from cmpt.data.shards import Shard, open_shards
from cmpt.data.validate import DataError, UnusableError
from cmpt.data.word_counts import WordCounts, counted_form, split_words, write_word_counts
from cmpt.recipe import RecipeError, check_recipe, load_recipe, resolve_path
from cmpt.recipe.schema import Data

PROGRESS_EVERY_S = 5.0
NEEDED_FIELDS = ("data.train", "data.caption")


@dataclass
class Tally:
    """What was counted of some shards."""

    words: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    samples: int = 0
    unusable: Counter[str] = field(default_factory=Counter)  # samples without a caption that can be used, by cause

    def add(self, other: Tally) -> None:
        self.words.update(other.words)
        self.captions += other.captions
        self.samples += other.samples
        self.unusable.update(other.unusable)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, e.g. recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to override, e.g. data.train=[...]")
    parser.add_argument("--output", metavar="FILE", help="default: what text_masking.frequencies of the recipe names")
    parser.add_argument("--least-count", type=int, default=1, metavar="N",
                        help="leave out words that occur less often; training then takes them for unknown, which are "
                        "the first to go (default: %(default)s, all stay)")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="PROCESSES",
                        help="shards that are read at the same time (default: the cores, %(default)s)")  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    for name in ("least_count", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        output, tally = run(options)
    except (BrokenProcessPool, DataError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {tally.captions} captions of {tally.samples} samples, {tally.words.total()} words, "
          f"{len(tally.words)} of them distinct")  # fmt: skip
    if options.least_count > 1:
        kept = sum(count >= options.least_count for count in tally.words.values())
        print(f"in the table: the {kept} words that occur at least {options.least_count} times")
    for cause, count in tally.unusable.most_common():
        print(f"not counted: {count} samples, {cause}")
    return 0


def run(options: argparse.Namespace) -> tuple[Path, Tally]:
    """Counts and writes the table. Raises RecipeError, DataError and OSError."""
    loaded = load_recipe(options.recipe, options.overrides)
    recipe = loaded.recipe
    # The recipe may name the table that is about to be made; only what is read here must be right.
    faults = [fault for fault in check_recipe(recipe, 1, loaded.origins) if fault.startswith(NEEDED_FIELDS)]
    if faults:
        raise RecipeError(faults)
    named = options.output or recipe.text_masking.frequencies
    if named is None:
        raise DataError("--output must name a file, for text_masking.frequencies of the recipe is null")
    output = Path(resolve_path(named))
    if not output.parent.is_dir():  # said before hours of counting, not after
        raise DataError(f"--output: no such folder: {output.parent}")
    shards = {shard.url: shard for source in recipe.data.train for shard in open_shards(source.urls, recipe.data)}
    tally = count(list(shards.values()), recipe.data, options.workers, report=_progress(len(shards)))
    kept = {word: count for word, count in tally.words.items() if count >= options.least_count}
    if not kept:
        causes = "".join(f"; {count} samples: {cause}" for cause, count in tally.unusable.most_common())
        raise DataError(f"no word occurs {options.least_count} times in {tally.captions} captions{causes}")
    write_word_counts(output, WordCounts(kept, tally.words.total(), tally.captions))
    return output, tally


def count(shards: Sequence[Shard], data: Data, workers: int, report: Callable[[int, Tally], None]) -> Tally:
    """All shards, `workers` of them at a time; `report` is told the number of shards done and what they held."""
    tally = Tally()
    for done, part in enumerate(_parts(shards, partial(count_shard, data), min(workers, len(shards))), start=1):
        tally.add(part)
        report(done, tally)
    return tally


def _parts(shards: Sequence[Shard], counted: Callable[[Shard], Tally], workers: int) -> Iterator[Tally]:
    """A tally per shard as each is ready. No more of them wait than there are workers, which bounds the memory."""
    if workers == 1:
        yield from map(counted, shards)
        return
    # Forking after torch was imported, whose threads may hold locks, could hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        remaining = iter(shards)
        running: set[Future[Tally]] = {pool.submit(counted, shard) for shard in islice(remaining, 2 * workers)}
        try:
            while running:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                for part in ready:
                    yield part.result()
                running |= {pool.submit(counted, shard) for shard in islice(remaining, len(ready))}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def count_shard(data: Data, shard: Shard) -> Tally:
    """The captions of one shard, in the order of the tar."""
    tally, reader = Tally(), ShardReader(1, data)
    if shard.fault:
        tally.unusable[str(shard.fault.cause)] += 1
    for place in range(shard.count):
        tally.samples += 1
        try:
            captions = read_captions(reader, shard, reader.members(shard, place), data)
        except UnusableError as error:
            tally.unusable[str(error.cause)] += 1
            continue
        tally.captions += len(captions)
        tally.words.update(counted_form(word) for caption in captions for word in split_words(caption))
    return tally


def _progress(shards: int) -> Callable[[int, Tally], None]:
    """Says on stderr how far the counting is, every few seconds."""
    told = time.monotonic()

    def report(done: int, tally: Tally) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_EVERY_S:
            told = time.monotonic()
            print(f"{done} of {shards} shards, {tally.captions} captions, {len(tally.words)} distinct words",
                  file=sys.stderr, flush=True)  # fmt: skip

    return report


if __name__ == "__main__":
    sys.exit(main())
