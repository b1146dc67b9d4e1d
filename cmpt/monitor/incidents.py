"""The part of the report that tells what happened to a run: restarts, refused batches, lost processes, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from cmpt.monitor.curves import Records
from cmpt.monitor.page import folded, section, table

_MOST_SHOWN = 100


def _rank(event: Mapping[str, Any]) -> str:
    place = f' in "{event["place"]}"' if event.get("place") else ""
    return f"rank {event.get('rank')} on {event.get('host', 'an unknown host')}{place}"


def _then(event: Mapping[str, Any]) -> str:
    if event.get("action") == "rewind":
        return f"left out, and on from the weights of step {event.get('back_to', 0):,}"
    return "left out" if event.get("action") == "skip" else "ended the run"


def _refused(event: Mapping[str, Any]) -> str:
    return f"{event.get('cause')}; batch {event.get('batch_digest')} {_then(event)}"


def _supervised(event: Mapping[str, Any]) -> str:
    """What tools/supervise.py did, e.g. "start: restart 1, hosts node01, node02"."""
    known = {"restart": "restart", "code": "exit code", "hosts": "hosts", "hosts_lost": "lost", "why": ""}
    fields = ((label, event.get(key)) for key, label in known.items())
    shown = [(label, ", ".join(value) if isinstance(value, list) else value) for label, value in fields]
    told = ", ".join(f"{label} {value}".strip() for label, value in shown if value not in (None, ""))
    return f"{event.get('event', '')}: {told}".removesuffix(": ")


# Kind of event -> what happened, and a sentence about it.
_TOLD: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "resume": ("resumed", lambda event: "from its newest sound checkpoint"),
    "refused": ("batch refused", _refused),
    "unequal_weights": ("unequal weights", lambda event: f"{event.get('cause')}; {_then(event)}"),
    "stall": ("stood still", lambda event: f"{_rank(event)}, for {event.get('seconds', 0):.0f} s"),
    "lost_rank": ("process lost", _rank),
    "lost_host": ("host lost", lambda event: f"{event.get('host')}, rank {event.get('rank')}"),
    "failed": ("process failed", lambda event: f"{_rank(event)}: {event.get('error')}"),
    "supervisor": ("supervisor", _supervised),
    "warning": ("warning", lambda event: str(event.get("text", ""))),
    "end": ("ended", lambda event: str(event.get("outcome", ""))),
}


def incidents(metrics: Records, events: Records) -> str:
    """A table of what happened, newest last; stacks folded; and what checkpoints cost."""
    shown = [event for event in events if event.get("kind") in _TOLD]
    note = "" if shown else "Nothing out of the ordinary is recorded."
    if len(shown) > _MOST_SHOWN:
        note = f"The last {_MOST_SHOWN} of {len(shown):,}; all are in events.jsonl."
    rows, stacks = [], []
    for event in shown[-_MOST_SHOWN:]:
        what, tell = _TOLD[str(event["kind"])]
        when = str(event.get("time", ""))[:19].replace("T", " ")
        rows.append((f"{event.get('step', 0):,}", escape(when), escape(what), escape(tell(event))))
        if event.get("stack"):
            stacks.append(folded(f"Stack of rank {event.get('rank')}", when, "\n".join(event["stack"])))
    parts = [table(("Step", "Time (UTC)", "What", ""), rows)] if rows else []
    return section("What happened", *parts, *stacks, note=" ".join(filter(None, (note, _checkpoints(metrics, events)))))


def _checkpoints(metrics: Records, events: Records) -> str:
    """E.g. "12 checkpoints of 42.1 MB, written at 310 MB/s; they held up training for 0.02 % of its time."."""
    written = [event for event in events if event.get("kind") == "checkpoint" and event.get("write_s")]
    if not written:
        return ""
    size = sum(event["bytes"] for event in written)
    speed = size / sum(event["write_s"] for event in written)
    count = "1 checkpoint" if len(written) == 1 else f"{len(written):,} checkpoints"
    told = f"{count} of {size / len(written) / 1e6:,.1f} MB, written at {speed / 1e6:,.0f} MB/s"
    spans = [(row["step_s"], row["step"]) for row in metrics if row.get("step_s") and row.get("step") is not None]
    steps = [0, *(step for _, step in spans)]
    seconds = sum(step_s * max(0, step - before) for (step_s, step), before in zip(spans, steps, strict=False))
    if not seconds:
        return told + "."
    share = sum(event.get("stall_s", 0.0) for event in written) / seconds
    return f"{told}; they held up training for {100 * share:.2g} % of its time."
