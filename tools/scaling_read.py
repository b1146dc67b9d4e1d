"""What a measured point says: from the timings that its ranks left (cmpt/monitor/timings.py) to one record.

Of every step, over the ranks: `compute` (masking, forward and backward pass, loss, records), `optimizer` and `data` are
means of what ranks spent outside of collectives. A rank that comes late to a collective waits least in it, so the least
wait of any rank is what the collective itself takes (`features`, `gradients`, `parameters`, `control`), and what the
others wait longer is `stragglers`. The terms add up to the step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmpt.monitor.records import read_records
from cmpt.monitor.timings import FOLDER
from step_model import COMMUNICATION

COMPUTE_PLACES = ("mask", "gradient", "records")
DATA_PLACES = ("data", "data ahead")
PLACES = (*COMPUTE_PLACES, *DATA_PLACES, "optimizer")
MEASURED_TERMS = ("compute", "optimizer", *COMMUNICATION, "stragglers", "data")

Line = Mapping[str, Any]


class TimingsError(ValueError):
    """The timings of a run are not there, or not whole."""


def read_timings(run_folder: Path, world_size: int, first: int, last: int) -> list[list[Line]]:
    """Lines by step (first … last, counted from 1) and rank. Raises TimingsError where one is missing."""
    ranks: list[dict[int, Line]] = []
    for rank in range(world_size):
        path = run_folder / FOLDER / f"rank_{rank:05d}.jsonl"
        try:
            lines = read_records(path)
        except (OSError, ValueError) as error:
            raise TimingsError(f"{path}: {error}") from error
        if not lines:
            raise TimingsError(f"{path}: holds nothing; do all hosts share this folder?")
        ranks.append({line["step"]: line for line in lines})
        missing = [step for step in range(first, last + 1) if step not in ranks[-1]]
        if missing:
            raise TimingsError(f"{path}: steps {missing[0]} to {missing[-1]} are missing")
    return [[rank[step] for rank in ranks] for step in range(first, last + 1)]


def step_terms_of(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds of one step by MEASURED_TERMS, `lines` being those of all ranks."""
    waits = {kind: [in_training(line, "waits", kind) for line in lines] for kind in COMMUNICATION}
    terms = {
        "compute": statistics.fmean(rank_compute(line) for line in lines),
        "optimizer": statistics.fmean(line["places"].get("optimizer", 0.0) for line in lines),
        "data": statistics.fmean(sum(line["places"].get(place, 0.0) for place in DATA_PLACES) for line in lines),
        "stragglers": sum(statistics.fmean(seconds) - min(seconds) for seconds in waits.values()),
    }
    terms |= {kind: min(seconds) for kind, seconds in waits.items()}
    return {term: terms[term] for term in MEASURED_TERMS}


def rank_compute(line: Line) -> float:
    return sum(line["places"].get(place, 0.0) for place in COMPUTE_PLACES)


def in_training(line: Line, what: str, kind: str) -> float:
    """Of a kind of collectives in the places of a training step: their "waits" in seconds, or the number of "calls"."""
    return float(sum(by_kind.get(kind, 0) for place, by_kind in line[what].items() if place in PLACES))


def measured(steps: Sequence[Sequence[Line]], batch_size: int) -> dict[str, Any]:
    """The record of a point: means over the middle half of its steps by their time, so that a moment in which the
    machine did something else does not count, and the terms still add up. `step_low_s`, `step_high_s`: of all steps."""
    every = [step_terms_of(lines) for lines in steps]
    seconds = [sum(found.values()) for found in every]
    quarter = len(steps) // 4
    middle = sorted(range(len(steps)), key=lambda number: seconds[number])[quarter : len(steps) - quarter]
    chosen, terms = [steps[number] for number in middle], [every[number] for number in middle]
    step_s = statistics.fmean(seconds[number] for number in middle)
    lines = [line for step in chosen for line in step]
    spreads = [statistics.pstdev([rank_compute(line) for line in step]) for step in chosen]
    sent = {kind: statistics.fmean(line["sent_bytes"].get(kind, 0) for line in lines) for kind in COMMUNICATION}
    samples = len(chosen) * batch_size
    return {
        "steps": len(chosen),
        "step_s": step_s,
        "step_low_s": min(seconds),
        "step_high_s": max(seconds),
        "images_per_s": batch_size / step_s,
        "terms_s": {term: statistics.fmean(found[term] for found in terms) for term in MEASURED_TERMS},
        "compute_spread_s": statistics.fmean(spreads),
        "sent_bytes": sent,
        "calls": {kind: statistics.fmean(in_training(line, "calls", kind) for line in lines) for kind in COMMUNICATION},
        "flops_per_sample": sum(step[0]["flops"] for step in chosen) / samples,
        "image_tokens_per_sample": sum(step[0]["image_tokens"] for step in chosen) / samples,
        "text_tokens_per_sample": sum(step[0]["text_tokens"] for step in chosen) / samples,
        "peak_memory_bytes": [max(step[rank]["peak_memory_bytes"] for step in steps) for rank in range(len(steps[0]))],
        "wire_bytes": wire_bytes(steps),
        "step_seconds": seconds,
    }


def wire_bytes(steps: Sequence[Sequence[Line]]) -> float:
    """Bytes that a host's network interfaces sent per step, the mean over hosts; all ranks of a host see the same."""
    hosts = {line["host"]: rank for rank, line in enumerate(steps[0])}
    spans = [steps[-1][rank]["wire_bytes"] - steps[0][rank]["wire_bytes"] for rank in hosts.values()]
    return statistics.fmean(spans) / max(1, len(steps) - 1)
