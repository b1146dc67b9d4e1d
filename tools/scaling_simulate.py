"""Play a run of days on nodes that fail, and find the checkpoint interval that wastes least:

    python tools/scaling.py --simulate --nodes 64 --days 10 --node-mtbf-hours 5000 [--out FOLDER]
    python tools/scaling.py --simulate --run runs/vitl14_laion --nodes 64 --days 10

The time between faults is exponential, with the mean of one node divided by the nodes; faults also come while the run
restarts, and no fewer of them while nodes are absent. A step waits `--stall` seconds for a checkpoint, which can be
used `--write` seconds after it was begun; a fault before that falls back to the one before, and no other is begun
meanwhile. All defaults are assumed; --run takes stall and write time from a run's own records.

Intervals are tried from the shortest that --write allows to the whole run, and nearer and nearer to the best, each with
the same faults. The closed forms beside it (Young 1974, doi 10.1145/361147.361115; Daly 2006, doi
10.1016/j.future.2004.11.016) have no part in that; they hold without stragglers and fewer nodes. Daly's useful share is
told with the time to write and the repair that is waited for as part of his restart; his interval knows neither, and
need not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmpt.monitor.records import read_records
from scaling_faults import (
    DAY_S,
    HOUR_S,
    LOST,
    Faults,
    Refused,
    as_good,
    daly_interval_s,
    effective,
    expected_wall_s,
    search,
    trials,
    young_interval_s,
)
from scaling_simulate_page import html, text

USER_ERROR = 2
INTERRUPTED = 130
_RANGES: dict[str, tuple[float, float]] = {
    "nodes": (1, 1e6),
    "days": (0.001, 1e9),
    "node_mtbf_hours": (1e-6, 1e9),
    "interval": (0.001, 1e9),
    "stall": (0, 1e9),
    "write": (0, 1e9),
    "restart": (0, 1e9),
    "repair_hours": (0, 1e9),
    "gpus_per_node": (1, 1e6),
    "streams": (1, 1e9),
    "slow_spells_per_node_day": (0, 1e6),
    "slow_minutes": (0, 1e9),
    "slow_factor": (1, 1e6),
    "trials": (1, 1e5),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        faults = _faults_of(options)
        for folder in filter(None, (options.out, options.json and options.json.parent)):
            folder.mkdir(parents=True, exist_ok=True)
        if options.json and options.json.is_dir():
            raise ValueError(f"--json {options.json}: must be a file, not a folder")
        return report(faults, options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/scaling.py --simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("the run").add_argument
    add("--nodes", type=int, required=True, metavar="N")
    add("--days", type=float, default=10.0, help="of useful training on all nodes (default: %(default)g)")
    add("--node-mtbf-hours", type=float, default=6_300.0, metavar="HOURS",
        help="mean time between faults of one node; inf: none (default, assumed: %(default)g: Llama 3 saw 419 "
        "unexpected interruptions in 54 days on 16,384 GPUs, nodes of 8; arXiv 2407.21783, section 3.3.4)")  # fmt: skip
    add("--restart", type=float, default=180.0, metavar="SECONDS",
        help="from a fault to training (default, assumed: %(default)g; 30 of them until the watchdog has ended the "
        "run)")  # fmt: skip
    add = parser.add_argument_group("checkpoints").add_argument
    add("--interval", type=float, metavar="SECONDS", help="of training between two (default: the best that is found)")
    add("--stall", type=float, metavar="SECONDS", help="that one holds training up (default, assumed: 5)")
    add("--write", type=float, metavar="SECONDS",
        help="from its begin until it can be used (default, assumed: 60, or --stall if that is longer)")  # fmt: skip
    add("--run", type=Path, metavar="RUNFOLDER", help="take --stall and --write from this run's checkpoints")
    add = parser.add_argument_group("lost nodes").add_argument
    add("--when-lost", choices=["spare", "fewer", "wait"], default="spare",
        help="another node takes the place, the run goes on with fewer until the repair, or it waits for it "
        "(default: %(default)s)")  # fmt: skip
    add("--repair-hours", type=float, default=4.0, metavar="HOURS",
        help="from a fault until the node is back, for fewer and wait (default, assumed: %(default)g)")  # fmt: skip
    add("--streams", type=int, metavar="N", help="data.streams, which the processes must divide: decides how many "
        "nodes go on with fewer (default: all that are left)")  # fmt: skip
    add("--gpus-per-node", type=int, default=8, metavar="N", help="for --streams (default: %(default)s)")
    add = parser.add_argument_group("stragglers").add_argument
    add("--slow-spells-per-node-day", type=float, default=0.0, metavar="N", help="(default: %(default)g)")
    add("--slow-minutes", type=float, default=30.0, metavar="MINUTES", help="of a spell (default: %(default)g)")
    add("--slow-factor", type=float, default=1.3, metavar="FACTOR",
        help="how much longer a step takes meanwhile (default: %(default)g)")  # fmt: skip
    add = parser.add_argument_group("the simulation").add_argument
    add("--trials", type=int, default=200, metavar="N", help="for each interval (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--out", type=Path, metavar="FOLDER", help="write simulation.html there")
    return parser.parse_args(arguments)


def _faults_of(options: argparse.Namespace) -> Faults:
    """Raises ValueError that names the option, its value and what it must be."""
    for name, (low, high) in _RANGES.items():
        value = getattr(options, name)
        allowed = value is None or low <= value <= high or (name == "node_mtbf_hours" and value == math.inf)
        if not allowed:
            told = f"{value:g}" if isinstance(value, float) else f"{value}"
            raise ValueError(f"--{name.replace('_', '-')} {told}: must be from {low:g} to {high:,.0f}")
    if options.run is not None:
        stall, write = checkpoint_times(options.run)
        options.stall = stall if options.stall is None else options.stall
        options.write = write if options.write is None else options.write
    stall = 5.0 if options.stall is None else options.stall
    write = max(stall, 60.0) if options.write is None else options.write
    if write < stall:
        raise ValueError(f"--write {write:g}: must be at least --stall {stall:g}, for it lasts from the same moment")
    if options.interval is not None and options.interval < write - stall:
        raise ValueError(
            f"--interval {options.interval:g}: must be at least {write - stall:g}, --write less --stall: a checkpoint "
            "that is due while the one before is still being written is left out"
        )
    if options.when_lost == "fewer" and options.nodes == 1:
        raise ValueError("--when-lost fewer: needs 2 nodes or more (--nodes 1)")
    nodes, streams, per_node = options.nodes, options.streams, options.gpus_per_node
    if streams is not None and streams % (nodes * per_node):
        raise ValueError(f"--streams {streams}: must be a multiple of --nodes {nodes} times --gpus-per-node {per_node}")
    return Faults(
        work_s=options.days * DAY_S,
        nodes=nodes,
        node_mtbf_s=options.node_mtbf_hours * HOUR_S,
        stall_s=stall,
        write_s=write,
        restart_s=options.restart,
        when_lost=options.when_lost,
        repair_s=options.repair_hours * HOUR_S,
        gpus_per_node=per_node,
        streams=streams,
        slow_per_node_s=options.slow_spells_per_node_day / DAY_S,
        slow_length_s=options.slow_minutes * 60,
        slow_factor=options.slow_factor,
    )


def checkpoint_times(run: Path) -> tuple[float, float]:
    """Median (stall, begin to usable) in seconds of a run's checkpoints. Raises ValueError where it has none."""
    if not (run / "events.jsonl").is_file():
        raise ValueError(f"--run {run}: there is no events.jsonl in it")
    saved = [event for event in read_records(run / "events.jsonl") if event["kind"] == "checkpoint"]
    saved = [event for event in saved if "stall_s" in event and "write_s" in event]
    if not saved:
        raise ValueError(f"--run {run}: its events.jsonl has no checkpoint")
    stall_s, write_s = (statistics.median(event[name] for event in saved) for name in ("stall_s", "write_s"))
    return stall_s, write_s  # write_s begins with the stall (engine/checkpoint.py)


def report(faults: Faults, options: argparse.Namespace) -> int:
    left_out: dict[float, Refused] = {}

    def useful(interval_s: float) -> float | None:
        try:
            return effective(faults, trials(faults, interval_s, options.trials, options.seed))[0]
        except Refused as error:
            left_out[interval_s] = error
            return None

    low = min(faults.shortest_interval_s, faults.work_s)
    shares = search(useful, low, faults.work_s)
    if not shares:
        raise left_out[min(left_out, key=lambda interval: expected_wall_s(faults, interval))]
    best = max(shares, key=lambda interval: shares[interval])
    chosen = best if options.interval is None else options.interval
    runs = trials(faults, chosen, options.trials, options.seed)
    mean, spread = effective(faults, runs)
    told = {
        "faults": asdict(faults),
        "trials": options.trials,
        "seed": options.seed,
        "best_interval_s": best,
        "as_good_s": as_good(shares),
        "at_edge": {low: "shortest", faults.work_s: "longest"}.get(best),
        "young_interval_s": young_interval_s(faults.stall_s, faults.mtbf_s),
        "daly_interval_s": daly_interval_s(faults.stall_s, faults.mtbf_s),
        "interval_s": chosen,
        "effective": mean,
        "effective_spread": spread,
        "effective_closed_form": faults.work_s / expected_wall_s(faults, chosen) if faults.has_closed_form else None,
        "wall_days": statistics.fmean(run.wall_s for run in runs) / DAY_S,
        "faults_met": statistics.fmean(run.faults for run in runs),
        "lost_days": {name: statistics.fmean(run.lost_s[name] for run in runs) / DAY_S for name in LOST},
        "by_interval": [{"interval_s": interval, "useful": share} for interval, share in shares.items()],
        "left_out": [{"interval_s": interval, "why": left_out[interval].why} for interval in sorted(left_out)],
    }
    print(text(told))
    if options.json:
        options.json.write_text(json.dumps(_finite(told), indent=1, allow_nan=False) + "\n")
    if options.out:
        path = options.out / "simulation.html"
        path.write_text(html(told, faults, runs[0]))
        print(f"\n{path}")
    return 0


def _finite(value: Any) -> Any:
    """Infinity, as of nodes that never fail, is no JSON: null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
