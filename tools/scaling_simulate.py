"""Play a run of days on nodes that fail, and find the checkpoint interval that wastes least:

    python tools/scaling.py --simulate --nodes 64 --days 10 --node-mtbf-hours 5000 [--out FOLDER]
    python tools/scaling.py --simulate --run runs/vitl14_laion --nodes 64 --days 10

The time between faults is exponential, with the mean of one node divided by the nodes; faults also come while the run
restarts. A step waits `--stall` seconds for a checkpoint, which can be used `--write` seconds after it was begun; a
fault before that falls back to the one before. All defaults are assumed; --run takes stall and write time from
a run's own records. The closed forms beside it (Young 1974, doi 10.1145/361147.361115; Daly 2006,
doi 10.1016/j.future.2004.11.016) hold for spares, no stragglers, and checkpoints that are usable when the step goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cmpt.monitor.records import read_records

USER_ERROR = 2
HOUR_S, DAY_S = 3600.0, 86400.0
_HOPELESS = 5.0
"""Times the fault-free time from which on a run is said never to end."""
_MOST = 1_000_000
"""Faults over all trials of an interval."""
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
    its stalls."""
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
    absent_s = 0.0  # until the lost node is back, with "fewer"
    run.course.append((0.0, 0.0))
    while True:
        slower = _slowdown(faults, up_s, draw)
        # Until the node is back the run is as fast as fewer hosts are; then it restarts with a checkpoint.
        returns = 0.0 < absent_s < up_s
        speed = (faults.share_meanwhile if absent_s > 0 else 1.0) / slower
        length_s = absent_s if returns else up_s
        done, kept, stalls, took_s = _segment(faults, interval_s, faults.work_s - saved, length_s, speed)
        run.wall_s += took_s
        run.lost_s["stalls"] += stalls
        over_s = took_s - stalls - done
        run.lost_s["fewer hosts" if absent_s > 0 else "stragglers"] += over_s
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
        absent_s = faults.repair_s if faults.when_lost == "fewer" else 0.0
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
    if math.isfinite(faults.mtbf_s) and wall_s <= _HOPELESS * faults.work_s and wall_s / faults.mtbf_s * count > _MOST:
        expected = wall_s / faults.mtbf_s
        raise ValueError(
            f"--trials {count}: with {expected:,.0f} faults each, expected {_MOST / expected:,.0f} or fewer"
        )
    return [play(faults, interval_s, random.Random(f"{seed} {trial}")) for trial in range(count)]


def effective(faults: Faults, runs: Sequence[Played]) -> tuple[float, float]:
    """(mean, standard deviation) over runs of useful time / wall time."""
    shares = [faults.work_s / run.wall_s for run in runs]
    return statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else 0.0


def grid(faults: Faults) -> list[float]:
    """Intervals to compare: a factor 16 around Young's, never below the stall."""
    middle = young_interval_s(max(faults.stall_s, 0.1), min(faults.mtbf_s, faults.work_s))
    return [max(faults.stall_s, middle * 2 ** (power / 2)) for power in range(-8, 9)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        faults = _faults_of(options)
        return report(faults, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/scaling.py --simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=int, required=True)
    add("--days", type=float, default=10.0, help="of useful training on all nodes (default: %(default)s)")
    add("--node-mtbf-hours", type=float, default=6_300.0,
        help="between faults of one node (default, assumed: %(default)s: Llama 3 saw 419 unexpected interruptions in "
        "54 days on 16,384 GPUs, nodes of 8; arXiv 2407.21783, section 3.3.4)")  # fmt: skip
    add("--interval", type=float, help="seconds between checkpoints; default: the best that is found")
    add("--stall", type=float, help="seconds that a checkpoint holds training up (default, assumed: 5)")
    add("--write", type=float, help="seconds until it can be used (default, assumed: 60)")
    add("--restart", type=float, default=180.0, help="seconds from a fault to training (default, assumed: %(default)s;"
        " 30 of them until the watchdog has ended the run)")  # fmt: skip
    add("--when-lost", choices=["spare", "fewer", "wait"], default="spare", help="(default: %(default)s)")
    add("--repair-hours", type=float, default=4.0, help="until a lost node is back (default, assumed: %(default)s)")
    add("--gpus-per-node", type=int, default=8)
    add("--streams", type=int, help="data.streams, which the processes must divide: decides how many nodes go on with "
        "--when-lost fewer")  # fmt: skip
    add("--slow-spells-per-node-day", type=float, default=0.0, help="(default: %(default)s)")
    add("--slow-minutes", type=float, default=30.0)
    add("--slow-factor", type=float, default=1.3, help="how much longer a step takes meanwhile")
    add("--run", type=Path, metavar="RUNFOLDER", help="take stall and write time from this run's checkpoints")
    add("--trials", type=int, default=200)
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    add("--out", type=Path, metavar="FOLDER", help="write simulation.html there")
    return parser.parse_args(arguments)


def _faults_of(options: argparse.Namespace) -> Faults:
    """Raises ValueError that names the option, its value and what it must be."""
    if options.run is not None:
        stall, write = checkpoint_times(options.run)
        options.stall = stall if options.stall is None else options.stall
        options.write = write if options.write is None else options.write
    stall = 5.0 if options.stall is None else options.stall
    write = max(stall, 60.0) if options.write is None else options.write
    for name in ("nodes", "days", "node_mtbf_hours", "trials", "gpus_per_node", "interval"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    for name in ("stall", "restart", "repair_hours", "slow_spells_per_node_day", "slow_minutes"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be 0 or more")
    if write < stall:
        raise ValueError(f"--write {write:g}: must be at least --stall {stall:g}, for it lasts from the same moment")
    if options.slow_factor < 1:
        raise ValueError(f"--slow-factor {options.slow_factor:g}: must be 1 or more")
    return Faults(
        work_s=options.days * DAY_S,
        nodes=options.nodes,
        node_mtbf_s=options.node_mtbf_hours * HOUR_S,
        stall_s=stall,
        write_s=write,
        restart_s=options.restart,
        when_lost=options.when_lost,
        repair_s=options.repair_hours * HOUR_S,
        share_meanwhile=fewer_nodes(options.nodes, options.gpus_per_node, options.streams) / options.nodes,
        slow_per_node_s=options.slow_spells_per_node_day / DAY_S,
        slow_length_s=options.slow_minutes * 60,
        slow_factor=options.slow_factor,
    )


def fewer_nodes(nodes: int, gpus_per_node: int, streams: int | None) -> int:
    """The most nodes below `nodes` whose processes divide the streams. Raises ValueError where there are none."""
    usable = [n for n in range(1, nodes) if streams is None or streams % (n * gpus_per_node) == 0]
    if nodes == 1:
        return 1
    if not usable:
        raise ValueError(f"--streams {streams}: fewer than {nodes} nodes of {gpus_per_node} never divide it")
    return usable[-1]


def checkpoint_times(run: Path) -> tuple[float, float]:
    """Median (stall, begin to usable) in seconds of a run's checkpoints. Raises ValueError where it has none."""
    if not (run / "events.jsonl").is_file():
        raise ValueError(f"--run {run}: there is no events.jsonl in it")
    saved = [event for event in read_records(run / "events.jsonl") if event["kind"] == "checkpoint"]
    saved = [event for event in saved if "stall_s" in event and "write_s" in event]
    if not saved:
        raise ValueError(f"--run {run}: its events.jsonl has no checkpoint")
    stall = statistics.median(event["stall_s"] for event in saved)
    return stall, stall + statistics.median(event["write_s"] for event in saved)


def report(faults: Faults, options: argparse.Namespace) -> int:
    compared, refused = {}, None
    for interval in sorted({*grid(faults), *([options.interval] if options.interval else [])}):
        try:
            compared[interval] = trials(faults, interval, options.trials, options.seed)
        except ValueError as error:
            refused = error
            if interval == options.interval:
                raise
    if not compared:
        assert refused is not None
        raise refused
    shares = {interval: effective(faults, runs) for interval, runs in compared.items()}
    best = max(shares, key=lambda interval: shares[interval][0])
    chosen = options.interval or best
    runs = compared[chosen]
    mean, spread = shares[chosen]
    told = {
        "faults": asdict(faults),
        "best_interval_s": best,
        "young_interval_s": young_interval_s(faults.stall_s, faults.mtbf_s),
        "daly_interval_s": daly_interval_s(faults.stall_s, faults.mtbf_s),
        "interval_s": chosen,
        "effective": mean,
        "effective_spread": spread,
        "effective_daly": faults.work_s / daly_wall_s(faults, chosen),
        "wall_days": statistics.fmean(run.wall_s for run in runs) / DAY_S,
        "faults_met": statistics.fmean(run.faults for run in runs),
        "lost_days": {name: statistics.fmean(run.lost_s[name] for run in runs) / DAY_S for name in LOST},
        "by_interval": {f"{interval:.0f}": share for interval, (share, _) in shares.items()},
    }
    from scaling_simulate_page import html, text  # which know what is here

    print(text(told))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "simulation.html"
        path.write_text(html(told, faults, runs[0]))
        print(f"\n{path}")
    return 0
