"""Who holds up a run: what the guardians report about their ranks, and the verdict. No input or output, no clock.

A report is what one guardian says about its rank: `rank, host, address, pid, state` (the letter of /proc/PID/stat),
`beats, number` (counters that grow while it lives and while its main thread gets on), `step, within, place, limit_s,
patient` (the newest mark). Times are seconds on the clock of the one that judges, which stands still while it is itself
held up: a suspended job or a machine without time to spare is no stall.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Report = dict[str, Any]

SETTLE_S = 1.0
"""How long other bad news is awaited, so that the end of a whole job is not blamed on one rank."""
FAILED_SETTLE_S = 2.0
"""The same after an error, which is often but the consequence of a rank that is gone."""
_STATES = {
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "D": "in an uninterruptible wait of the kernel",
}


class Verdict(NamedTuple):
    kind: str
    """"stall", "lost_host", "lost_rank" or "failed"."""
    culprits: list[Report]
    """Their last reports, with `seconds` (since they were last known to be well) and a `state` in words."""


class _Seen:
    """What is known of one rank, and when each part of it changed last."""

    def __init__(self, report: Report, now: float) -> None:
        self.report = report
        self.heard_at = self.beat_at = self.mark_at = now
        self.gone_at: float | None = None
        self.closed_at: float | None = None
        self.failed_at: float | None = None
        self.error = ""

    @property
    def stopped(self) -> bool:
        return self.report["state"] in ("T", "t")

    @property
    def progress(self) -> tuple[int, int]:
        return self.report["step"], self.report["within"]


class Judge:
    """`world` ranks, of which those count that were heard of. `silence_s`: how long a rank may show no life."""

    def __init__(self, world: int, silence_s: float) -> None:
        self._world, self._silence_s = world, silence_s
        self._ranks: dict[int, _Seen] = {}

    def hear(self, report: Report, now: float) -> None:
        seen = self._ranks.setdefault(report["rank"], _Seen(report, now))
        if report["beats"] != seen.report["beats"]:
            seen.beat_at = now
        if report["number"] != seen.report["number"]:
            seen.mark_at = now
        seen.report, seen.heard_at = report, now

    def left(self, rank: int) -> None:
        """It said goodbye, and is judged no more."""
        self._ranks.pop(rank, None)

    def gone(self, rank: int, now: float) -> None:
        """Its process is no more, and it did not say goodbye."""
        if rank in self._ranks and self._ranks[rank].gone_at is None:
            self._ranks[rank].gone_at = now

    def closed(self, rank: int, now: float) -> None:
        """The connection to its guardian broke without goodbye."""
        seen = self._ranks.get(rank)
        if seen is not None and seen.gone_at is None and seen.failed_at is None:
            seen.closed_at = now

    def all_gone(self) -> bool:
        return all(seen.gone_at is not None for seen in self._ranks.values())

    def failed(self, rank: int, error: str, now: float) -> None:
        """It said goodbye with an error."""
        seen = self._ranks[rank]
        if seen.failed_at is None:
            seen.failed_at, seen.error = now, error

    def verdict(self, now: float) -> Verdict | None:
        here = list(self._ranks.values())
        gone = [seen for seen in here if seen.gone_at is not None]
        if gone:
            settled = now - min(seen.gone_at or 0.0 for seen in gone) >= SETTLE_S
            return self._verdict("lost_rank", gone, now) if settled and len(gone) < len(here) else None
        failed = sorted((seen for seen in here if seen.failed_at is not None), key=lambda seen: seen.failed_at or 0.0)
        if not failed and all(seen.stopped for seen in here):
            for seen in here:  # somebody holds the whole job, with Ctrl-Z for example: that time does not count
                seen.heard_at = seen.beat_at = seen.mark_at = now
            return None
        lost = [seen for seen in here if self._lost(seen, now)]
        if lost:
            return self._verdict("lost_host", lost, now)
        if failed:
            settled = len(failed) == len(here) or now - (failed[0].failed_at or 0.0) >= FAILED_SETTLE_S
            return self._verdict("failed", failed[:1], now) if settled else None
        frozen = [seen for seen in here if self._frozen(seen, now)]
        if frozen:
            return self._verdict("stall", frozen, now)
        return self._late(here, now)

    def _lost(self, seen: _Seen, now: float) -> bool:
        if seen.closed_at is not None and now - seen.closed_at >= SETTLE_S:
            return True
        return now - seen.heard_at > self._silence_s

    def _frozen(self, seen: _Seen, now: float) -> bool:
        if self._world == 1:
            return False  # nobody waits for it
        patient = seen.report["patient"] and not seen.stopped
        return now - seen.beat_at > (seen.report["limit_s"] if patient else self._silence_s)

    def _late(self, here: list[_Seen], now: float) -> Verdict | None:
        """The others wait for those that got least far: only if all of these are beyond their limits the run stands.

        Not if one of them is: where it had waited for a rank that has just caught up with it, both now go on.
        """
        least = min(seen.progress for seen in here)
        slowest = [seen for seen in here if seen.progress == least]
        if any(now - seen.mark_at <= seen.report["limit_s"] for seen in slowest):
            return None
        half = self._silence_s / 2
        if any(now - seen.heard_at > half or seen.closed_at is not None for seen in here):
            return None  # a host is about to be lost; then that is the cause
        lifeless = [seen for seen in here if now - seen.beat_at > half]
        return self._verdict("stall", lifeless or slowest, now)

    def _verdict(self, kind: str, culprits: list[_Seen], now: float) -> Verdict:
        return Verdict(kind, [self._culprit(kind, seen, now) for seen in culprits])

    def _culprit(self, kind: str, seen: _Seen, now: float) -> Report:
        since, state = seen.heard_at, ""
        if kind == "stall":
            lifeless = now - seen.beat_at > self._silence_s / 2
            since = seen.beat_at if lifeless else seen.mark_at
            state = _STATES.get(seen.report["state"], "no thread of Python runs: one holds the GIL" if lifeless else "")
        elif kind == "lost_host":
            state = "does not answer" if seen.closed_at is None else "the connection broke"
        error = {"error": seen.error} if kind == "failed" else {}
        return seen.report | {"seconds": round(now - since, 1), "state": state} | error


def describe(kind: str, culprit: Report) -> str:
    """One line for people: who, since when, where."""
    address = f"{culprit['address']}, " if culprit["address"] else ""
    who = f"watchdog: rank {culprit['rank']} on host {culprit['host']} ({address}pid {culprit['pid']})"
    where = f'at step {culprit["step"]} in "{culprit["place"]}"'
    state = f" ({culprit['state']})" if culprit["state"] else ""
    if kind == "stall":
        return f"{who} has stood still for {culprit['seconds']:.0f} s {where}{state}"
    if kind == "lost_host":
        return f"{who} is lost with its host{state}; last heard of {culprit['seconds']:.0f} s ago {where}"
    if kind == "lost_rank":
        return f"{who} is gone without a word, killed or crashed; it was {where}"
    return f"{who} failed {where}: {culprit['error']}"
