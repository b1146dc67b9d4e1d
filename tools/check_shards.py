"""Check shards before a training: whether they can be read, what is in them, and what of it training cannot use.

    python tools/check_shards.py URL... [key=value ...] [--decode | --headers-only] [--json FILE] [--beside]
    python tools/check_shards.py --recipe RECIPE [key=value ...] [...]

URLs may have braces and wildcards, and may be remote. With a recipe, its data settings hold; the shards are those of
its data.train and data.heldout, or the URLs. Without one, what differs from the defaults is given as in a recipe, e.g.
data.caption_extension=json data.caption_field=captions. Every sample passes the checks that training makes, so the
counts by cause are those of an epoch. The indexes that are made on the way are those that a training start needs.
The status is 0 where all can be used, 1 where something cannot, 2 where the question was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import NoReturn

# With --decode each of the processes imports torch, but computes nothing with it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cmpt.data.shards import expand_urls, short_names
from cmpt.data.validate import DataError
from cmpt.recipe import RecipeError, check_recipe, load_recipe
from cmpt.recipe.check_data import data_faults
from cmpt.recipe.paths import is_local
from cmpt.recipe.schema import Data, Source
from shard_contents import HEADERS, PIXELS, SAMPLES, Checks, Contents, SharedKeys, Task, check_shard
from shard_report import JsonResult, Totals, table

BASE = Path(__file__).parents[1] / "recipes/base.yaml"
SETTING = re.compile(r"[a-z_]+(\.\w+)+=")  # what is no URL: data.caption_field=text
AHEAD = 16  # shards per process that may be finished while the first of them is not
TICK_S, PLAIN_EVERY_S = 0.25, 5.0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help tells more)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="URL | key=value", help="shards, and values of the recipe")
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file, e.g. recipes/quickstart.yaml")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--decode", dest="depth", action="store_const", const=PIXELS, default=SAMPLES,
                       help="decode every image too: finds what only the decoder refuses, takes longer")  # fmt: skip
    depth.add_argument("--headers-only", dest="depth", action="store_const", const=HEADERS, default=SAMPLES,
                       help="read the tars' headers alone: counts, missing parts, keys, shards cut short")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the result, with every sample that cannot be used; - is "
                        "the standard output")  # fmt: skip
    parser.add_argument("--beside", action="store_true", help="write an index beside every local shard as well, for "
                        "hosts that share the file system but no data.cache_folder")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="PROCESSES",
                        help="shards that are read at the same time (default: the cores, %(default)s)")  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    try:
        totals = run(options)
    except KeyboardInterrupt:
        print("stopped; no result was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenProcessPool:
        print("error: a process ended unasked, perhaps for want of memory; fewer --workers need less", file=sys.stderr)
        return 2
    except (DataError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if totals.sound else 1


def run(options: argparse.Namespace) -> Totals:
    """Checks, writes the result and prints the table. Raises RecipeError, DataError and OSError."""
    data = settings(options)
    tasks = list_tasks(data)
    checks = Checks(data, options.depth, options.beside)
    # What cannot be written is said before hours of reading, not after.
    cache_folder = Path(data.cache_folder).expanduser()
    _make_writable(cache_folder, "data.cache_folder")
    if options.beside:
        for folder in sorted({os.path.dirname(task.url) or "." for task in tasks if is_local(task.url)}):
            _make_writable(Path(folder), "--beside")
    names = short_names([task.url for task in tasks])  # sources may have shards of the same names
    totals, shared = Totals(checks, names), SharedKeys(cache_folder)
    begun, workers = time.monotonic(), min(options.workers, len(tasks))
    with JsonResult(options.json, checks) as result:
        counts = multiprocessing.get_context("spawn").Array("q", 2)
        with (
            _Progress(len(tasks), counts, totals) as progress,
            closing(_checked(tasks, checks, workers, counts, progress)) as parts,
        ):
            for number, contents in enumerate(parts):
                shared.add(number, contents)
                totals.add(contents)
                result.add(contents)
        totals.shared_keys, totals.shared_examples = shared.find()
        result.write(totals)
    out = sys.stderr if options.json == "-" else sys.stdout
    print(table(totals, time.monotonic() - begun, workers), file=out)
    return totals


def settings(options: argparse.Namespace) -> Data:
    """The data settings, with the shards that are to be checked. Raises RecipeError for what is wrong with them."""
    overrides = [text for text in options.given if SETTING.match(text)]
    urls = [text for text in options.given if not SETTING.match(text)]
    if not urls and not options.recipe:
        raise DataError("nothing to check: give URLs of shards, or --recipe FILE")
    loaded = load_recipe(options.recipe or str(BASE), overrides)
    recipe, faults = loaded.recipe, []
    if urls:
        recipe = replace(recipe, data=replace(recipe.data, train=[Source(urls)], heldout=[]))
        for key, value, constraint in data_faults(recipe.data):
            if key == "data.train.0.urls":
                faults.append(f"{value}: {constraint.removesuffix(f'; give your own: {key}=[...]')}")
    # A model or a duration that cannot be is none of the shards' business.
    for fault in check_recipe(recipe, 1, loaded.origins):
        if fault.startswith("data.") and not (urls and fault.startswith("data.train.0.urls ")):
            faults.append(fault)
    if faults:
        raise RecipeError(faults)
    return recipe.data


def list_tasks(data: Data) -> list[Task]:
    """Every shard once, though sources may share it. Raises DataError."""
    sources = [(source.urls, f"data.train.{number}") for number, source in enumerate(data.train)]
    tasks: dict[str, Task] = {}
    for patterns, name in [*sources, (data.heldout, "data.heldout")]:
        urls = expand_urls(patterns, name)
        for url, short in zip(urls, short_names(urls), strict=True):
            tasks.setdefault(url, Task(url, short, heldout=name == "data.heldout"))
    return list(tasks.values())


def _make_writable(folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be written: {error.strerror or error}") from error


def _checked(
    tasks: Sequence[Task], checks: Checks, workers: int, counts: SynchronizedArray[int], progress: _Progress
) -> Generator[Contents, None, None]:
    """What each shard holds, in the order of the tasks. A few per process wait for their turn, which bounds memory."""
    if workers == 1:
        for task in tasks:
            yield check_shard(checks, task, partial(_advance, counts, progress))
        return
    others = set(multiprocessing.active_children())
    # Forking beside threads, as the live progress has one, could hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin, initargs=(counts,))
    remaining, running = iter(tasks), deque[Future[Contents]]()

    def submit(most: int) -> None:
        with _uninterrupted():
            running.extend(pool.submit(_check_in_worker, checks, task) for task in islice(remaining, most))

    try:
        submit(AHEAD * workers)
        while running:
            wait([running[0]], timeout=TICK_S)
            progress.tick(sum(future.done() for future in running))
            if running[0].done():
                yield running.popleft().result()
                submit(1)
    except BaseException:
        # Of an interrupt, and of errors that end it all: nobody waits for shards that are half read.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C, which a terminal sends to all: the main one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counts: SynchronizedArray[int]  # of this process, where it is a worker


class _Ended(SystemExit):
    """Raised in a worker that is to end: on its way up a fetch ends the processes that it started."""


def _begin(counts: SynchronizedArray[int]) -> None:
    def end(*_: object) -> NoReturn:
        raise _Ended

    global _counts
    _counts = counts
    signal.signal(signal.SIGTERM, end)


def _check_in_worker(checks: Checks, task: Task) -> Contents:
    try:
        return check_shard(checks, task, partial(_advance, _counts, None))
    except _Ended:
        os._exit(128 + signal.SIGTERM)  # the pool would take it for the outcome, and begin the next shard


def _advance(counts: SynchronizedArray[int], progress: _Progress | None, samples: int, unusable: int) -> None:
    with counts.get_lock():
        counts[0] += samples
        counts[1] += unusable
    if progress is not None:
        progress.tick(0)


class _Progress:
    """How far it is, on stderr: a live line on a terminal, a line every few seconds anywhere else."""

    def __init__(self, shards: int, counts: SynchronizedArray[int], totals: Totals) -> None:
        """`counts`: samples checked and found unusable so far, by all processes. `totals`: of the shards that came."""
        self._shards, self._counts, self._totals = shards, counts, totals
        self._begun: float | None = None  # when the first sample was checked: processes take seconds to start
        self._told = time.monotonic()
        console = Console(stderr=True)
        self._live: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (BarColumn(20), TextColumn("{task.fields[told]}"))
            self._live = Progress(*columns, console=console, transient=True)
            self._task = self._live.add_task("", total=1.0, told=f"0 of {shards:,} shards")

    def __enter__(self) -> _Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _read(self, place: int) -> int:
        """Without the lock, with which a process may have died."""
        return int(self._counts.get_obj()[place])

    def tick(self, waiting: int) -> None:
        """Tells what is new if it is time to. `waiting`: shards that are done and not yet in the totals."""
        now, samples = time.monotonic(), self._read(0)
        if samples and self._begun is None:
            self._begun = now
        if now - self._told < (TICK_S if self._live is not None else PLAIN_EVERY_S):
            return
        self._told = now
        share, told = self._state(now, samples, waiting)
        if self._live is not None:
            self._live.update(self._task, completed=share, told=told)
        else:
            print(told, file=sys.stderr, flush=True)

    def _state(self, now: float, samples: int, waiting: int) -> tuple[float, str]:
        """The share that is done, and a line."""
        totals, unusable = self._totals, self._read(1)
        seconds = now - self._begun if self._begun is not None else 0.0
        done = totals.shards + waiting
        share = done / self._shards
        if totals.samples:  # shards of which a part is read count in part
            share = min(1.0, samples / (totals.samples / totals.shards * self._shards))
        parts = [f"{done:,} of {self._shards:,} shards"]
        if not samples and not done:
            return 0.0, "  ".join([*parts, "starting"])
        parts.append(f"{samples:,} samples")
        if seconds >= 1.0:
            parts.append(f"{samples / seconds:,.0f}/s")
        parts.append(f"{unusable:,} unusable")
        if totals.faults:
            parts.append(f"{totals.faults.total():,} faulty shards")
        if seconds >= 1.0 and 0.0 < share < 1.0 and done < self._shards:
            parts.append(f"{_clock(seconds * (1.0 - share) / share)} left")
        return share, "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


if __name__ == "__main__":
    sys.exit(main())
