"""Which samples are in global step n: computed from the order alone, nothing is decoded and nothing is trained.

    python -m cmpt.data.streams RECIPE [key=value ...] --step N [--run FOLDER] [--checked FILE] [--json]

Samples that cannot be used shift what follows in their stream. Which ones they are is known from the records of the run
(FOLDER, by default that of the recipe: the checkpoint before N, and the skips in events.jsonl since) or from the result
of tools/check_shards.py (FILE); without either, every sample is taken to be usable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmpt.data.index import load_index
from cmpt.data.loader import batch_digest
from cmpt.data.reader import ShardReader
from cmpt.data.rows import row_identity, stream_digest
from cmpt.data.samples import sample_key
from cmpt.data.shards import Ranks, Shard, open_sources
from cmpt.data.streams import LoaderState, Position, SourceOrder, draw_sources
from cmpt.data.validate import Cause, DataError
from cmpt.recipe import RecipeError, check_recipe, load_recipe
from cmpt.recipe.schema import Recipe

_ITS_FIELDS = ("data.", "engine.batch_size", "run.seed")
_DRAWN_TOGETHER = 1 << 20
_NO_SAMPLE = frozenset({Cause.DECODE_FAILED, Cause.EMPTY_SHARD, Cause.TRUNCATED_SHARD, Cause.DAMAGED_SHARD})


class Slot(NamedTuple):
    """One row of a global batch."""

    ordinal: int  # of the run: (step - 1) * global batch + place in the batch
    stream: int
    source: int
    epoch: int  # of the source, in this stream
    unit: int
    member: int  # place in tar order


@dataclass(frozen=True)
class LeftOut:
    """What a run does not use."""

    samples: Mapping[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    """(source, unit) -> places of samples that are left out whenever they come."""
    lost: Mapping[int, frozenset[tuple[int, int, int]]] = field(default_factory=dict)
    """Step -> (stream, source, unit) of shards whose rest a stream left out on the way to that step's batch."""


class Ledger:
    """The order of a whole run, as a pure function of its settings."""

    def __init__(
        self,
        seed: int,
        unit_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        streams: int,
        batch_size: int,
        left_out: LeftOut = LeftOut(),  # noqa: B008
    ) -> None:
        """`unit_sizes`: samples of every shard, per source. `batch_size`: global, a multiple of `streams`."""
        self._seed, self._weights, self._left_out = seed, weights, left_out
        self._orders = [SourceOrder(seed, number, sizes, streams) for number, sizes in enumerate(unit_sizes)]
        self._streams, self._rows, self._batch_size = streams, batch_size // streams, batch_size

    def initial_state(self) -> LoaderState:
        return LoaderState.initial(range(self._streams), len(self._orders))

    def step(self, step: int, start: LoaderState | None = None) -> list[Slot]:
        """The global batch of `step` (1 is the first), in order. `start`: a state of the run at or before it."""
        start = start or self.initial_state()
        if step <= start.step:
            raise ValueError(f"step must be above {start.step}, got {step}")
        cursors = {stream: list(start.cursors[stream]) for stream in range(self._streams)}
        done = start.step
        for lost in sorted(at for at in self._left_out.lost if done < at < step):
            self._advance(cursors, done, lost - 1)
            self._walk(cursors, lost)
            done = lost
        self._advance(cursors, done, step - 1)
        return self._walk(cursors, step)

    def _sources(self, first_step: int, last_step: int) -> Iterator[NDArray[np.int64]]:
        """The source of every slot of the steps after the first up to the last: [steps, streams, rows], in parts."""
        together = max(1, _DRAWN_TOGETHER // self._batch_size)
        for done in range(first_step, last_step, together):
            until = min(done + together, last_step)
            ordinals = np.arange(done * self._batch_size, until * self._batch_size, dtype=np.int64)
            yield draw_sources(self._seed, ordinals, self._weights).reshape(until - done, self._streams, self._rows)

    def _advance(self, cursors: dict[int, list[Position]], done: int, step: int) -> None:
        """Moves every cursor from behind step `done` to behind `step`."""
        counts = np.zeros((self._streams, len(self._orders)), dtype=np.int64)
        if len(self._orders) == 1:
            counts[:] = (step - done) * self._rows
        else:
            for drawn in self._sources(done, step):
                for source in range(len(self._orders)):
                    counts[:, source] += (drawn == source).sum(axis=(0, 2))
        for stream, cursor in cursors.items():
            for source, count in enumerate(counts[stream].tolist()):
                cursor[source] = self._behind(source, stream, cursor[source], count)

    def _behind(self, source: int, stream: int, position: Position, count: int) -> Position:
        """The position behind the next `count` samples that are used."""
        order = self._orders[source]
        if not any(of == source for of, _ in self._left_out.samples):  # whole epochs by their sizes alone
            epoch, offset = position
            while offset + count > (size := order.part_size(stream, epoch)):
                epoch, offset, count = epoch + 1, 0, count - max(0, size - offset)
            return epoch, offset + count
        while count:
            stretch = order.stretch(stream, position)
            unused = self._left_out.samples.get((source, stretch.unit), frozenset())
            used = stretch.size
            if unused or used > count:
                places = [nth for nth, member in enumerate(order.members(stretch), 1) if member not in unused]
                used = len(places)
                if used > count:
                    return stretch.epoch, stretch.offset + places[count - 1]
            count, position = count - used, stretch.behind
        return position

    def _walk(self, cursors: dict[int, list[Position]], step: int) -> list[Slot]:
        (drawn,) = self._sources(step - 1, step)
        lost = self._left_out.lost.get(step, frozenset())
        slots: list[Slot] = []
        for stream, cursor in cursors.items():
            for source in drawn[0, stream].tolist():
                ordinal = (step - 1) * self._batch_size + len(slots)
                slots.append(self._next(ordinal, stream, source, cursor, lost))
        return slots

    def _next(
        self, ordinal: int, stream: int, source: int, cursor: list[Position], lost: frozenset[tuple[int, int, int]]
    ) -> Slot:
        order = self._orders[source]
        while True:
            stretch = order.stretch(stream, cursor[source])
            unused = self._left_out.samples.get((source, stretch.unit), frozenset())
            if (stream, source, stretch.unit) not in lost:
                for nth, member in enumerate(order.members(stretch), 1):
                    if member not in unused:
                        cursor[source] = (stretch.epoch, stretch.offset + nth)
                        return Slot(ordinal, stream, source, stretch.epoch, stretch.unit, member)
            cursor[source] = stretch.behind


def slots_digest(slots: Sequence[Slot], keys: Sequence[str], streams: int) -> str:
    """The batch_digest that metrics.jsonl has for a step of these slots."""
    identities: list[list[bytes]] = [[] for _ in range(streams)]
    for slot, key in zip(slots, keys, strict=True):
        identities[slot.stream].append(row_identity(slot.source, key))
    return batch_digest(map(stream_digest, identities))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cmpt.data.streams",
        description="List the samples of one global step of a recipe, in order, without running anything. Samples that "
        "cannot be used shift what follows: they are taken from the records of the run, or from a result of "
        "tools/check_shards.py; without either every sample counts as usable.",
    )
    parser.add_argument("recipe", help="a YAML file, for example recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as they were given to cmpt/train.py")
    parser.add_argument("--step", type=int, required=True, help="1 is the first; as in metrics.jsonl")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run folder; default: the recipe's, if it is there")
    parser.add_argument("--checked", type=Path, metavar="FILE", help="JSON of tools/check_shards.py, instead of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object per sample, instead of a table")
    options = parser.parse_intermixed_args(arguments)
    if options.step < 1:
        parser.error(f"--step must be at least 1, got {options.step}")
    try:
        loaded = load_recipe(options.recipe, options.overrides)
        faults = [fault for fault in check_recipe(loaded.recipe, 1, loaded.origins) if fault.startswith(_ITS_FIELDS)]
        if faults:
            raise RecipeError(faults)
        show(loaded.recipe, options)
    except RecipeError as error:
        print("\n".join(f"error: {fault}" for fault in error.faults), file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # into `head`
        sys.stderr.close()
    return 0


def show(recipe: Recipe, options: argparse.Namespace) -> None:
    """Prints the samples of `options.step` and their digest."""
    folder = options.run or Path(recipe.run.folder).expanduser() / recipe.run.name
    if options.run is not None and not (folder / "recipe.yaml").is_file():
        raise DataError(f"--run = {folder}: is not a run folder, it has no recipe.yaml")
    if (folder / "recipe.yaml").is_file() and not options.checked:
        theirs = load_recipe(str(folder / "recipe.yaml")).recipe
        for key, own, its in _what_orders(recipe, theirs):
            if own != its:
                raise DataError(f"{key} = {own}: the run in {folder} has {its}; give its recipe, or another run.name")
    shards = open_sources(recipe.data, Ranks())
    events = [] if options.checked else list(_lines(folder / "events.jsonl"))
    left_out = checked(options.checked, shards) if options.checked else of_events(events, shards)
    ledger = Ledger(
        recipe.run.seed,
        [[shard.count for shard in source] for source in shards],
        [source.weight for source in recipe.data.train],
        streams=recipe.data.streams,
        batch_size=recipe.engine.batch_size,
        left_out=left_out,
    )
    slots = ledger.step(options.step, None if options.checked else newest_state(folder, options.step))
    reader = ShardReader(capacity=recipe.data.streams + 2, data=recipe.data)
    keys = [sample_key(shard, reader.members(shard, slot.member)) for slot in slots for shard in [_shard(shards, slot)]]
    if not options.json:
        print(f"{'slot':>12} {'stream':>6} {'source':>6} {'epoch':>5}  sample")
    for slot, key in zip(slots, keys, strict=True):
        if options.json:
            url = _shard(shards, slot).url
            row = {"slot": slot.ordinal, "stream": slot.stream, "source": slot.source, "epoch": slot.epoch}
            print(json.dumps(row | {"key": key, "shard": url, "place": slot.member}))
        else:
            print(f"{slot.ordinal:>12} {slot.stream:>6} {slot.source:>6} {slot.epoch:>5}  {key}")
    digest = slots_digest(slots, keys, recipe.data.streams)
    logged = {row["step"]: row.get("batch_digest") for row in _lines(folder / "metrics.jsonl")}
    verdict = ""
    if options.step in logged and not options.checked:
        verdict = ", as the run logged it" if logged[options.step] == digest else ", but the run logged another one"
    elif not events and not options.checked:
        verdict = " (no record of a run: every sample counts as usable)"
    print(f"batch_digest {digest}{verdict}", file=sys.stderr if options.json else sys.stdout)


def _what_orders(recipe: Recipe, other: Recipe) -> Iterator[tuple[str, object, object]]:
    """The settings that decide which sample comes when."""
    yield "run.seed", recipe.run.seed, other.run.seed
    yield "data.streams", recipe.data.streams, other.data.streams
    yield "data.train", recipe.data.train, other.data.train
    yield "engine.batch_size", recipe.engine.batch_size, other.engine.batch_size


def _shard(shards: Sequence[Sequence[Shard]], slot: Slot) -> Shard:
    return shards[slot.source][slot.unit]


def newest_state(folder: Path, step: int) -> LoaderState | None:
    """The loader state of the newest checkpoint before a step; None where there is none."""
    found = sorted(folder.glob("checkpoints/step_*/state.json"), reverse=True)
    for path in found:
        state = LoaderState.from_json(json.loads(path.read_text())["loader"])
        if state.step < step:
            return state
    return None


def of_events(events: Sequence[Mapping[str, Any]], shards: Sequence[Sequence[Shard]]) -> LeftOut:
    """What the skips in a run's events.jsonl say was left out."""
    units = {(source, shard.name): unit for source, part in enumerate(shards) for unit, shard in enumerate(part)}
    keys: dict[tuple[int, int], dict[str, set[str]]] = {}
    lost: dict[int, set[tuple[int, int, int]]] = {}
    for event in events:
        if event.get("kind") != "skip" or event["cause"] in _NO_SAMPLE:
            continue
        source = int(event.get("source", 0))
        if event["cause"] == Cause.UNREACHABLE_SHARD:
            if event["step"] > 0 and (source, event["key"]) in units:
                lost.setdefault(event["step"], set()).add((event["stream"], source, units[source, event["key"]]))
            continue
        name, key = _split(event["key"], source, units)
        keys.setdefault((source, units[source, name]), {}).setdefault(key, set()).add(event["cause"])
    samples = {unit: _places(shards[unit[0]][unit[1]], named) for unit, named in keys.items()}
    return LeftOut(samples, {step: frozenset(places) for step, places in lost.items()})


def _split(key: str, source: int, units: Mapping[tuple[int, str], int]) -> tuple[str, str]:
    """The shard's name and the sample's key, both of which may hold slashes."""
    parts = key.split("/")
    for length in range(1, len(parts)):
        name = "/".join(parts[:length])
        if (source, name) in units:
            return name, "/".join(parts[length:])
    raise DataError(f"events.jsonl names sample {key}, of a shard that data.train.{source} does not have")


def _places(shard: Shard, causes: Mapping[str, set[str]]) -> frozenset[int]:
    """Where the samples of these keys lie; of a repeated key the repetitions, where that was a cause."""
    index = load_index(shard.index_path)
    if index is None:
        raise DataError(f"{shard.url}: its index is gone, {shard.index_path}")
    places = set()
    for place in range(len(index)):
        members = index.sample(place)
        its = causes.get(members.key, set())
        if (Cause.DUPLICATE_KEY in its) if members.repeated else its - {Cause.DUPLICATE_KEY}:
            places.add(place)
    return frozenset(places)


def checked(path: Path, shards: Sequence[Sequence[Shard]]) -> LeftOut:
    """What tools/check_shards.py found unusable. Raises DataError for a file that is not its result."""
    try:
        result = json.loads(path.read_text())
        rows, depth = result["shards"], result["checks"]
        unusable = {row["url"]: frozenset(int(sample["place"]) for sample in row["unusable"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--checked = {path}: is not a result of tools/check_shards.py: {error!r}") from error
    if depth == "headers":
        raise DataError(f"--checked = {path}: was made with --headers-only, which looks at no sample")
    return LeftOut(
        {
            (source, unit): unusable[shard.url]
            for source, part in enumerate(shards)
            for unit, shard in enumerate(part)
            if unusable.get(shard.url)
        }
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; none where it is not there. A line cut by a crash is passed over."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


if __name__ == "__main__":
    sys.exit(main())
