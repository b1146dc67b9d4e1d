"""A run that meets faults, as `tools/scaling.py --simulate` plays it, and closed forms for its checkpoint interval."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

HOUR_S, DAY_S = 3600.0, 86400.0
_HOPELESS = 5.0
"""Times the fault-free time from which on a run is said never to end."""
_MOST = 1_000_000
"""Faults over all trials of an interval."""
_FINEST = 1.05
"""From one interval to the next, where the search for the best one ends."""
ALIKE = 0.001
"""Shares of the time that differ by less are as good: for the range of intervals beside the best one."""
LOST = ("recomputed", "stalls", "restarts", "waiting for hosts", "fewer hosts", "stragglers")


@dataclass(frozen=True)
class Faults:
    """What a run meets, all in seconds."""

    work_s: float
    """Of useful training on all nodes."""
    nodes: int
    node_mtbf_s: float
    """Mean time between faults of one node."""
    stall_s: float
    """That training waits for a checkpoint."""
    write_s: float
    """From a checkpoint's begin until it can be used; at least the stall."""
    restart_s: float
    """From a fault until training goes on: noticed, processes started, weights loaded."""
    when_lost: str = "spare"
    """"spare": another node takes the place; "fewer": the run goes on with fewer until the repair; "wait": for it."""
    repair_s: float = 4 * HOUR_S
    """Until a lost node is back."""
    share_meanwhile: float = 1.0
    """Of the speed, with "fewer"."""
    slow_per_node_s: float = 0.0
    """Slow spells of a node per second."""
    slow_length_s: float = 0.0
    slow_factor: float = 1.0
    """By how much a slow node, and with it every step, takes longer."""

    @property
    def mtbf_s(self) -> float:
        """Of all nodes together."""
        return self.node_mtbf_s / self.nodes

    @property
    def shortest_interval_s(self) -> float:
        """Useful seconds between checkpoints worth a try: none is due while the one before is still being written, for
        the engine would leave it out, and training takes no less time than holding it up."""
        return max(1.0, self.stall_s, self.write_s - self.stall_s)


@dataclass
class Played:
    """One run: wall seconds, where they went, and its course."""

    wall_s: float = 0.0
    faults: int = 0
    lost_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOST, 0.0))
    course: list[tuple[float, float]] = field(default_factory=list)
    """(wall seconds, useful seconds done), at every turn."""


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Useful seconds between checkpoints: sqrt(2 C M) (Young 1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order interval (2006, equation 37); M where a checkpoint takes 2 M or more."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return young_interval_s(stall_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def daly_wall_s(faults: Faults, interval_s: float) -> float:
    """Expected wall seconds: M e^(R/M) (e^((tau + C)/M) - 1) T / tau (Daly 2006, section 3); without faults, T and
    its stalls. An interval that is longer than the run is as long as the run."""
    interval_s = min(interval_s, faults.work_s)
    mtbf, period = faults.mtbf_s, interval_s + faults.stall_s
    if math.isinf(mtbf):
        return faults.work_s * period / interval_s
    if (period + faults.restart_s) / mtbf > 500:
        return math.inf
    return mtbf * math.exp(faults.restart_s / mtbf) * math.expm1(period / mtbf) * faults.work_s / interval_s


def play(faults: Faults, interval_s: float, draw: random.Random) -> Played:
    """One run with a checkpoint after every `interval_s` useful seconds. Raises ValueError where it would never end."""
    if daly_wall_s(faults, interval_s) > _HOPELESS * faults.work_s:
        hours = faults.mtbf_s / HOUR_S
        raise ValueError(f"a fault every {hours:.3g} h, restarts of {faults.restart_s:g} s and a checkpoint every "
                         f"{interval_s:g} s: this run would never end")  # fmt: skip
    run, saved = Played(), 0.0
    up_s = _uptime(faults, draw)
    absent_s = 0.0  # from the restart until the lost node is back, with "fewer"
    run.course.append((0.0, 0.0))
    while True:
        slower = _slowdown(faults, up_s, draw)
        # Until the node is back the run is as fast as fewer hosts are; then it restarts with a checkpoint.
        returns = 0.0 < absent_s < up_s
        share = faults.share_meanwhile if absent_s > 0 else 1.0
        speed = share / slower
        length_s = absent_s if returns else up_s
        done, kept, stalls, took_s = _segment(faults, interval_s, faults.work_s - saved, length_s, speed)
        run.wall_s += took_s
        run.lost_s["stalls"] += stalls
        run.lost_s["fewer hosts"] += done / share - done
        run.lost_s["stragglers"] += (slower - 1) * done / share
        run.course.append((run.wall_s, saved + done))
        if saved + done >= faults.work_s * (1 - 1e-12):
            return run
        if returns:
            saved, up_s, absent_s = saved + done, up_s - absent_s, 0.0
            restart_s = min(up_s, faults.restart_s)
            run.wall_s, up_s = run.wall_s + restart_s, up_s - restart_s
            run.lost_s["restarts"] += restart_s
            run.course.append((run.wall_s, saved))
            if up_s > 0:
                continue
        else:
            run.lost_s["recomputed"] += done - kept
            saved += kept
        run.faults += 1
        absent_s = max(0.0, faults.repair_s - faults.restart_s) if faults.when_lost == "fewer" else 0.0
        up_s = _come_back(faults, run, draw)
        run.course.append((run.wall_s, saved))


def _uptime(faults: Faults, draw: random.Random) -> float:
    return draw.expovariate(1 / faults.mtbf_s) if math.isfinite(faults.mtbf_s) else math.inf


def _come_back(faults: Faults, run: Played, draw: random.Random) -> float:
    """Restart after a fault, again if another one comes meanwhile. Returns the seconds until the next fault."""
    waits_s = faults.repair_s if faults.when_lost == "wait" else 0.0
    while True:
        up_s = _uptime(faults, draw)
        needed_s = waits_s + faults.restart_s
        spent_s = min(up_s, needed_s)
        waiting_s = min(spent_s, waits_s)
        run.lost_s["waiting for hosts"] += waiting_s
        run.lost_s["restarts"] += spent_s - waiting_s
        run.wall_s += spent_s
        if up_s > needed_s:
            return up_s - needed_s
        run.faults += 1


def _slowdown(faults: Faults, up_s: float, draw: random.Random) -> float:
    """How much longer steps take over a stretch in which some node is slow for part of the time."""
    if faults.slow_per_node_s == 0 or faults.slow_factor == 1:
        return 1.0
    stretch_s = min(up_s, faults.work_s)
    expected = faults.slow_per_node_s * faults.nodes * stretch_s
    spells = max(0.0, draw.gauss(expected, math.sqrt(expected)))
    covered = 1 - math.exp(-spells * faults.slow_length_s / stretch_s)  # spells of several nodes overlap
    return 1 + covered * (faults.slow_factor - 1)


def _segment(
    faults: Faults, interval_s: float, left_s: float, length_s: float, speed: float
) -> tuple[float, float, float, float]:
    """Train for `length_s` or until `left_s` is done: (useful done, useful that a checkpoint keeps, stalls, wall)."""
    wall_interval_s = interval_s / speed
    period_s = wall_interval_s + faults.stall_s
    whole = math.ceil(left_s / interval_s - 1e-9) - 1  # checkpoints before the end; the last one is the run's own
    needed_s = left_s / speed + whole * faults.stall_s
    if needed_s <= length_s:
        return left_s, left_s, whole * faults.stall_s, needed_s
    begun = math.floor(length_s / period_s)
    within_s = length_s - begun * period_s
    done = begun * interval_s + min(within_s, wall_interval_s) * speed
    stalls = begun * faults.stall_s + max(0.0, within_s - wall_interval_s)
    # The k-th begins after k intervals and k - 1 stalls, and can be used write_s later.
    usable = math.floor((length_s - faults.write_s + faults.stall_s) / period_s)
    return done, max(0, usable) * interval_s, stalls, length_s


def trials(faults: Faults, interval_s: float, count: int, seed: int) -> list[Played]:
    """The same faults for every interval that is compared: each trial has its own generator. Raises ValueError where
    the run would never end, or where its faults are too many to play."""
    wall_s = daly_wall_s(faults, interval_s)
    expected = wall_s / faults.mtbf_s
    if wall_s <= _HOPELESS * faults.work_s and expected * count > _MOST:
        fewer = f"--trials {int(_MOST / expected)} or fewer" if expected < _MOST else "fewer days or nodes"
        raise ValueError(
            f"--trials {count}: a run meets {expected:,.0f} faults, and {_MOST:,} are played at most; give {fewer}"
        )
    return [play(faults, interval_s, random.Random(f"{seed} {trial}")) for trial in range(count)]


def effective(faults: Faults, runs: Sequence[Played]) -> tuple[float, float]:
    """(mean, standard deviation) over runs of useful time / wall time."""
    shares = [faults.work_s / run.wall_s for run in runs]
    return statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else 0.0


def search(useful: Callable[[float], float | None], low: float, high: float) -> dict[float, float]:
    """By interval: the useful share of every interval that was tried on the way to the best one.

    `useful` gives it, or None for an interval that cannot be played. Intervals are tried from `low` to `high`, each
    twice the one before, then nearer and nearer to the best. The closed forms have no part in it.
    """
    tried: dict[float, float | None] = {}
    for power in range(math.ceil(math.log2(max(1.0, high / low)))):
        tried[low * 2**power] = useful(low * 2**power)
    tried[high] = useful(high)
    step = 2.0
    while step > _FINEST and (found := _known(tried)):
        best = max(found, key=lambda interval: found[interval])
        near = [min(max(interval, low), high) for interval in (best / step, best * step)]
        new = [interval for interval in near if not any(math.isclose(interval, old, rel_tol=0.01) for old in tried)]
        tried |= {interval: useful(interval) for interval in new}
        if max(_known(tried), key=lambda interval: tried[interval] or 0.0) == best:
            step = math.sqrt(step)
    return dict(sorted(_known(tried).items()))


def _known(tried: Mapping[float, float | None]) -> dict[float, float]:
    return {interval: share for interval, share in tried.items() if share is not None}


def as_good(shares: Mapping[float, float]) -> tuple[float, float]:
    """The range around the best of these intervals in which the share is less than ALIKE below its own; between two
    intervals that were tried, on the line through them over log(interval)."""
    tried = sorted(shares)
    best = tried.index(max(tried, key=lambda interval: shares[interval]))
    least = shares[tried[best]] - ALIKE

    def end(outwards: Sequence[float]) -> float:
        for inner, outer in itertools.pairwise(outwards):
            if shares[outer] < least:
                part = (shares[inner] - least) / (shares[inner] - shares[outer])
                return inner * (outer / inner) ** part
        return outwards[-1]

    return end(tried[best::-1]), end(tried[best:])
