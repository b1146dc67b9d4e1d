"""The top of the report: which run this is, how far it came, what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from cmpt.monitor.console import clock_time, percent
from cmpt.monitor.curves import DIRECTIONS, Records
from cmpt.monitor.page import facts, figures

UNKNOWN = "not recorded"


def header(name: str, metrics: Records, evaluations: Records, events: Records, environment: Mapping[str, Any]) -> str:
    """`environment` is the content of environment.json; the keys read here are revision, host and world_size.

    The number of parameters is the field `parameters` of an event, the latest that has one.
    """
    seconds = training_seconds(metrics)
    parameters = next((int(event["parameters"]) for event in reversed(events) if event.get("parameters")), 0)
    return (
        f'<header><p class="kicker">Training report</p><h1>{escape(name)}</h1>'
        f"{_state(metrics, evaluations, events)}"
        f"{figures(_key_figures(metrics, evaluations, seconds, parameters))}"
        f"{facts(_facts(metrics, evaluations, events, environment, seconds, parameters))}</header>"
    )


def _state(metrics: Records, evaluations: Records, events: Records) -> str:
    turns = [event for event in events if event.get("kind") in ("start", "resume", "end")]
    if not turns and not metrics:
        return '<p class="lead">Nothing is recorded yet.</p>'
    closed = bool(turns) and turns[-1]["kind"] == "end"
    state = str(turns[-1].get("outcome")) if closed else "still running, or killed"
    reached = max(row.get("step") or 0 for row in (*metrics, *evaluations, *turns))
    planned = next((event["steps"] for event in reversed(turns) if event.get("steps")), None)
    so_far = f" at step {reached:,}" + (f" of {planned:,}" if planned else "")
    kind = "state finished" if state == "finished" else "state"
    return f'<p class="lead"><span class="{kind}">{escape(state[:1].upper() + state[1:])}</span>{so_far}.</p>'


def _key_figures(metrics: Records, evaluations: Records, seconds: float, parameters: int) -> list[tuple[str, str]]:
    tiles = []
    results = evaluations[-1] if evaluations else {}
    measures = [(f"{key}_r10", f"R@10, {label.lower()}") for key, label in DIRECTIONS]
    for key, label in (*measures, ("zero_shot_top1", "zero-shot top-1")):
        if results.get(key) is not None:
            tiles.append((percent(results[key]), label))
    if metrics and metrics[-1].get("samples_seen") is not None:
        tiles.append((short_count(metrics[-1]["samples_seen"]), "samples seen"))
    if seconds:
        tiles.append((clock_time(seconds), "of training"))
    if parameters:
        tiles.append((short_count(parameters), "parameters"))
    return tiles


def _facts(
    metrics: Records,
    evaluations: Records,
    events: Records,
    environment: Mapping[str, Any],
    seconds: float,
    parameters: int,
) -> list[tuple[str, str]]:
    last = metrics[-1] if metrics else {}
    starts = [event for event in events if event.get("kind") in ("start", "resume")]
    recipe = str(starts[-1].get("recipe") or UNKNOWN) if starts else UNKNOWN
    pairs = [
        ("Recipe", recipe),
        ("Revision", str(environment.get("revision") or UNKNOWN)),
        ("Hardware", _hardware(environment) or UNKNOWN),
        ("Parameters", f"{parameters:,}" if parameters else UNKNOWN),
    ]
    if starts:
        resumes = len(starts) - 1
        times = ", resumed once" if resumes == 1 else f", resumed {resumes} times" if resumes else ""
        pairs.append(("Started", str(starts[0].get("time", ""))[:16].replace("T", " ") + " UTC" + times))
    if seconds:
        evaluating = sum(row.get("seconds") or 0.0 for row in evaluations)
        extra = f", and {clock_time(evaluating)} of evaluation" if evaluating else ""
        pairs.append(("Duration", f"{clock_time(seconds)} of training steps{extra}"))
    if last.get("samples_seen") is not None:
        epoch = f", {last['epoch']:,.2f} epochs" if last.get("epoch") is not None else ""
        speed = f", {last['samples_seen'] / seconds:,.0f} per second" if seconds else ""
        pairs.append(("Samples seen", f"{last['samples_seen']:,}{epoch}{speed}"))
    if last.get("flops_per_sample") is not None:
        pairs.append(("FLOPs per sample", f"{last['flops_per_sample'] / 1e9:,.3g} billion"))
    if last.get("mfu") is not None:
        pairs.append(("FLOPs utilisation", percent(last["mfu"])))
    if last.get("peak_memory_bytes") is not None:
        pairs.append(("Peak memory", f"{last['peak_memory_bytes'] / 2**30:,.2f} GiB"))
    return pairs


def training_seconds(metrics: Records) -> float:
    """Time spent in steps, resumes joined: samples between two logged steps over the speed logged for them."""
    seconds, before = 0.0, 0
    for row in metrics:
        samples, speed = row.get("samples_seen"), row.get("samples_per_s")
        if samples is not None and speed:
            seconds += (samples - before) / speed
        before = samples if samples is not None else before
    return seconds


def _hardware(environment: Mapping[str, Any]) -> str:
    """E.g. "8 x NVIDIA H100 80GB HBM3 per node; Intel Xeon, 96 cores; 64 processes"."""
    host = environment.get("host") or {}
    gpus = Counter(host.get("gpus") or [])
    parts = [" and ".join(f"{count} x {name}" for name, count in gpus.items()) + " per node"] if gpus else []
    if host.get("cpu"):
        parts.append(str(host["cpu"]) + (f", {host['cores']} cores" if host.get("cores") else ""))
    processes = environment.get("world_size")
    if processes and parts:
        parts.append("one process" if processes == 1 else f"{processes} processes")
    return "; ".join(parts)


def short_count(value: float) -> str:
    """150 M, 12.8 B; below a million the number itself."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"
