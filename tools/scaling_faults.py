"""A run that meets faults, as `tools/scaling.py --simulate` plays it, and closed forms for its checkpoint interval."""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

HOUR_S, DAY_S = 3600.0, 86400.0
_HOPELESS = 5.0
"""Times the fault-free time and one pause: a run that is expected to take longer is not played."""
_HOPELESS_PLAYED = 100.0
"""The same for one played run; with stragglers or fewer nodes what is expected is no more than near."""
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
    gpus_per_node: int = 1
    streams: int | None = None
    """data.streams, which the processes must divide; a multiple of those of all nodes. None: any number of nodes can go
    on."""
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
    def has_stragglers(self) -> bool:
        return self.slow_per_node_s > 0 and self.slow_length_s > 0 and self.slow_factor > 1

    @property
    def has_closed_form(self) -> bool:
        return self.when_lost != "fewer" and not self.has_stragglers

    @functools.cached_property
    def mean_speed(self) -> float:
        """Over the run, of the speed of all nodes; about. How many are absent is taken as Poisson's."""
        lost = min(self.repair_s, self.work_s / 2) / self.mtbf_s if self.when_lost == "fewer" else 0.0
        covered = -math.expm1(-self.slow_per_node_s * self.nodes * self.slow_length_s)  # spells of nodes overlap
        share = 1.0
        if 0 < lost < self.nodes:
            near = 8 * math.sqrt(lost) + 4
            counts = range(max(0, math.floor(lost - near)), min(self.nodes, math.ceil(lost + near)) + 1)
            weights = [math.exp(count * math.log(lost) - lost - math.lgamma(count + 1)) for count in counts]
            shares = (weight * self.share(count) for count, weight in zip(counts, weights, strict=True))
            share = sum(shares) / sum(weights)
        elif lost:
            share = self.share(self.nodes)
        return share / (1 + covered * (self.slow_factor - 1))

    @property
    def pause_s(self) -> float:
        """From a fault until training goes on, where no other one comes meanwhile."""
        return self.restart_s + (self.repair_s if self.when_lost == "wait" else 0.0)

    def share(self, lost: int) -> float:
        """Of the speed of all nodes without these. Where none is left one is taken to go on."""
        return usable_nodes(self.nodes - lost, self.gpus_per_node, self.streams) / self.nodes

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

    def lose(self, name: str, seconds: float) -> None:
        self.wall_s += seconds
        self.lost_s[name] += seconds


@functools.cache
def usable_nodes(most: int, gpus_per_node: int, streams: int | None) -> int:
    """The most nodes, up to these, whose processes divide the streams; at least one."""
    return next((n for n in range(most, 1, -1) if streams is None or streams % (n * gpus_per_node) == 0), 1)


class Refused(ValueError):
    """An interval that cannot be played. `why`: in a few words, the same for all that are refused for it."""

    def __init__(self, why: str, told: str) -> None:
        super().__init__(told)
        self.why = why


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Useful seconds between checkpoints: sqrt(2 C M) (Young 1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order interval (2006, equation 37); M where a checkpoint takes 2 M or more."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return young_interval_s(stall_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def expected_wall_s(faults: Faults, interval_s: float) -> float:
    """Seconds: M e^(R/M) (e^((tau + C)/M) - 1) T / tau (Daly 2006, section 3), with a restart that is longer by the
    repair that is waited for and by write_s - stall_s: k intervals are kept where a fault comes after k periods and
    that time, which is e^(-(W - C)/M) times as likely as without it. The last interval has no checkpoint.

    Fewer nodes or stragglers count by the mean speed, which is no more than near.
    """
    work_s, interval_s = faults.work_s / faults.mean_speed, interval_s / faults.mean_speed
    before = max(0, math.ceil(work_s / interval_s - 1e-9) - 1)
    last_s, mtbf, period_s = work_s - before * interval_s, faults.mtbf_s, interval_s + faults.stall_s
    again_s = faults.pause_s + faults.write_s - faults.stall_s
    if math.isinf(mtbf):
        return work_s + before * faults.stall_s
    if (min(period_s, work_s) + again_s) / mtbf > 500:
        return math.inf
    end_s = mtbf * math.exp(faults.pause_s / mtbf) * math.expm1(last_s / mtbf)
    return end_s + (before and before * mtbf * math.exp(again_s / mtbf) * math.expm1(period_s / mtbf))


def play(faults: Faults, interval_s: float, draw: random.Random) -> Played:
    """One run with a checkpoint after every `interval_s` useful seconds. Raises Refused where it takes too long."""
    limit_s = faults.work_s + faults.pause_s
    if expected_wall_s(faults, interval_s) > _HOPELESS * limit_s:
        raise _too_long(faults, interval_s, f"is expected to take more than {_HOPELESS:g} times its work and a pause")
    run, saved = Played(), 0.0
    up_s = _uptime(faults, draw)
    absent: deque[float] = deque()  # wall seconds at which lost nodes are back, with "fewer"; the next one first
    run.course.append((0.0, 0.0))
    while run.wall_s < _HOPELESS_PLAYED * limit_s:
        share, more_s, back = _fewer(faults, absent, run.wall_s)
        returns = more_s < up_s
        length_s = more_s if returns else up_s
        left_s = faults.work_s - saved
        speed = share / _slowdown(faults, min(length_s, left_s), draw)
        done, kept, stalls_s = _segment(faults, interval_s, left_s, length_s, speed)
        run.wall_s += done
        run.lose("fewer hosts", done / share - done)
        run.lose("stragglers", done / speed - done / share)
        run.lose("stalls", stalls_s)
        run.course.append((run.wall_s, saved + done))
        if done >= left_s:
            return run
        up_s -= length_s
        if returns:  # the run ends with a checkpoint, waits until it is written, and starts with more nodes
            for _ in range(back):
                absent.popleft()
            written_s = min(up_s, faults.write_s)
            restart_s = min(up_s - written_s, faults.restart_s)
            kept = done if written_s == faults.write_s else kept
            run.lose("stalls", written_s)
            run.lose("restarts", restart_s)
            up_s = up_s - written_s - restart_s
        run.lost_s["recomputed"] += done - kept
        saved += kept
        if up_s == 0:
            up_s = _come_back(faults, run, absent, draw)
        run.course.append((run.wall_s, saved))
    raise _too_long(faults, interval_s, f"takes more than {_HOPELESS_PLAYED:g} times its work and a pause")


def _fewer(faults: Faults, absent: deque[float], now_s: float) -> tuple[float, float, int]:
    """(share of the speed, seconds until enough nodes are back for more, how many are back then)."""
    while absent and absent[0] <= now_s:
        absent.popleft()
    share = faults.share(len(absent))
    if faults.share(0) == share:
        return share, math.inf, 0
    counts = range(1, len(absent) + 1)
    back = counts[bisect_left(counts, True, key=lambda count: faults.share(len(absent) - count) > share)]
    return share, absent[back - 1] - now_s, back


def _too_long(faults: Faults, interval_s: float, why: str) -> Refused:
    return Refused(
        f"the run {why}",
        f"a fault every {faults.mtbf_s / HOUR_S:.3g} h, {faults.pause_s:g} s until training goes on after it, and a "
        f"checkpoint every {interval_s:.6g} s: this run {why}",
    )


def _uptime(faults: Faults, draw: random.Random) -> float:
    return draw.expovariate(1 / faults.mtbf_s) if math.isfinite(faults.mtbf_s) else math.inf


def _come_back(faults: Faults, run: Played, absent: deque[float], draw: random.Random) -> float:
    """From a fault until training goes on, anew if another one comes meanwhile. Returns the seconds until the next."""
    waits_s = faults.pause_s - faults.restart_s
    while True:
        run.faults += 1
        if faults.when_lost == "fewer":
            absent.append(run.wall_s + faults.repair_s)
        up_s = _uptime(faults, draw)
        spent_s = min(up_s, faults.pause_s)
        waiting_s = min(spent_s, waits_s)
        run.lose("waiting for hosts", waiting_s)
        run.lose("restarts", spent_s - waiting_s)
        if up_s > faults.pause_s:
            return up_s - faults.pause_s


def _slowdown(faults: Faults, length_s: float, draw: random.Random) -> float:
    """How much longer steps take over a stretch in which some node is slow for part of the time."""
    if not faults.has_stragglers or length_s <= 0:
        return 1.0
    expected = faults.slow_per_node_s * faults.nodes * length_s
    spells = max(0.0, draw.gauss(expected, math.sqrt(expected)))
    covered = 1 - math.exp(-spells * faults.slow_length_s / length_s)  # spells of several nodes overlap
    return 1 + covered * (faults.slow_factor - 1)


def _segment(
    faults: Faults, interval_s: float, left_s: float, length_s: float, speed: float
) -> tuple[float, float, float]:
    """Train for `length_s` or until `left_s` is done: seconds of (useful done, useful that a checkpoint keeps, stalls).

    `speed` is 1 or less, so that a checkpoint can be used before the next one begins.
    """
    # Checkpoints before the end; the last one is the run's own.
    whole = max(0, math.ceil(left_s / interval_s - 1e-9) - 1)
    if left_s / speed + whole * faults.stall_s <= length_s:
        return left_s, left_s, whole * faults.stall_s
    wall_interval_s = interval_s / speed
    period_s = wall_interval_s + faults.stall_s
    begun, within_s = divmod(length_s, period_s)
    done = begun * interval_s + min(within_s, wall_interval_s) * speed
    # The k-th begins after k intervals and k - 1 stalls, and can be used write_s later.
    usable = max(0.0, (length_s - faults.write_s + faults.stall_s) // period_s)
    return done, min(done, usable * interval_s), begun * faults.stall_s + max(0.0, within_s - wall_interval_s)


def trials(faults: Faults, interval_s: float, count: int, seed: int) -> list[Played]:
    """The same faults for every interval that is compared: each trial has its own generator. Raises Refused where the
    run takes too long, or where its faults are too many to play."""
    wall_s = expected_wall_s(faults, interval_s)
    met = wall_s / faults.mtbf_s
    if wall_s <= _HOPELESS * (faults.work_s + faults.pause_s) and (1 + met) * count > _MOST:
        most, days = _MOST / (1 + met), faults.work_s / DAY_S
        option = f"--trials {count}: must be {math.floor(most):,} or fewer"
        if most < 1:
            possible = days * (_MOST / count - 1) / met
            option = (
                f"--days {days:g}: must be {possible:,.{0 if possible > 10 else 3}f} or fewer with --trials {count}"
            )
        raise Refused(
            "its faults are too many to play",
            f"{option}: each trial meets about {met:,.3g} faults, and {_MOST:,} over all trials are played at most",
        )
    return [play(faults, interval_s, random.Random(f"{seed} {trial}")) for trial in range(count)]


def effective(faults: Faults, runs: Sequence[Played]) -> tuple[float, float]:
    """Useful time / wall time: of all runs together, which is what closed forms tell; standard deviation over runs."""
    shares = [faults.work_s / run.wall_s for run in runs]
    return statistics.harmonic_mean(shares), statistics.stdev(shares) if len(shares) > 1 else 0.0


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
