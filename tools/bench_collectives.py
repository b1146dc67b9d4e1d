"""How fast collectives are on the given hosts: a latency and a bandwidth for each, fitted to measured times.

    deepspeed [--hostfile HOSTFILE] tools/bench_collectives.py [--seconds 20] [--out FILE.json]

also with `torchrun`. Through the process group that training uses (NCCL on GPUs, gloo on hosts). A repeat is several
operations one after the other, so that ranks which leave the barrier at different times weigh little, as NCCL's tests
do it; it takes as long as its slowest rank. The time of a size is the median over repeats, the first ones left out.
Bandwidth is bytes in the ring count of one rank (cmpt/dist/traffic.py) per second, their "bus bandwidth".
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from cmpt.dist import process_group
from cmpt.dist.process_group import all_gather_into, gather_objects, reduce_scatter_into
from cmpt.dist.traffic import ring_bytes
from least_squares import solve

SIZES = tuple(2**power for power in range(12, 27, 2))
"""Bytes of the whole: 4 KiB to 64 MiB."""
PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
_WARM_UP, _FEWEST, _MOST = 2, 5, 200
_AT_LEAST_BYTES = 2**20
"""Sizes up to this are measured however slow the link is: less says nothing of a bandwidth."""
_REPEAT_S, _MOST_IN_A_REPEAT = 0.02, 20
_GROWS = 4  # from one size to the next
USER_ERROR = 2


class CollectivesError(ValueError):
    """A file of this benchmark cannot be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="about so long in all (default: %(default)s)")
    parser.add_argument("--largest-mib", type=int, default=64, help="the largest size (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every measured value there, on rank 0")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher
    options = parser.parse_args(arguments)
    if not 0 < options.seconds < math.inf:
        parser.error(f"--seconds {options.seconds:g}: must be above 0, and finite")
    if options.largest_mib < 1:
        parser.error(f"--largest-mib {options.largest_mib}: must be at least 1")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.absolute().parent}")
    rank, world, device = process_group.start()
    try:
        if world == 1:
            parser.error("a single process has no collectives: start it with two or more")
        sizes = [size for size in SIZES if size <= options.largest_mib * 2**20]
        found = benchmark(sizes, options.seconds, world, device)
        if rank == 0:
            print(table(found))
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        process_group.stop()
    return 0


def benchmark(sizes: Sequence[int], seconds: float, world: int, device: torch.device) -> dict[str, Any]:
    """Every operation at every size; all ranks return the same."""
    share_s = seconds / (len(sizes) * len(PASSES))
    ops: dict[str, Any] = {}
    left_out = {}
    for name, passes in PASSES.items():
        try:
            points: list[dict[str, float]] = []
            for size in sizes:  # larger ones only while there is time: all ranks know the same seconds
                needed_s = points[-1]["seconds"] * _GROWS * (_WARM_UP + _FEWEST) if points else 0.0
                if size <= _AT_LEAST_BYTES or needed_s < share_s * len(sizes) / 2:
                    points.append(timed(name, size, share_s, world, device))
        except (RuntimeError, NotImplementedError, ValueError) as error:  # a backend need not have all of them
            left_out[name] = str(error).splitlines()[0]
            continue
        for point in points:
            point["sent_bytes"] = ring_bytes(int(point["bytes"]), world, passes)
        latency_s, bytes_per_s, off = fit_link(points)
        ops[name] = {"points": points, "latency_s": latency_s, "bytes_per_s": bytes_per_s, "fit_error": off}
    return {
        "world_size": world,
        "hosts": gather_objects(socket.gethostname()),
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ops": ops,
        "left_out": left_out,
    }


def timed(name: str, size: int, share_s: float, world: int, device: torch.device) -> dict[str, float]:
    """Seconds of one operation on `size` bytes in all: the median, and the middle half, over repeats."""
    whole = torch.zeros(size // 4 // world * world, device=device)
    part = torch.zeros(len(whole) // world, device=device)
    run: Callable[[], Any] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: all_gather_into(whole, part),
        "reduce_scatter": lambda: reduce_scatter_into(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }[name]

    def once(operations: int) -> float:
        process_group.barrier()
        _wait(device)
        began = time.perf_counter()
        for _ in range(operations):
            run()
        _wait(device)
        return _slowest(time.perf_counter() - began) / operations

    one_s = [once(1) for _ in range(_WARM_UP)][-1]
    operations = min(_MOST_IN_A_REPEAT, math.ceil(_REPEAT_S / one_s))
    repeats = min(_MOST, max(_FEWEST, int(share_s / (operations * one_s))))
    low, middle, high = statistics.quantiles([once(operations) for _ in range(repeats)], n=4)
    return {"bytes": whole.nbytes, "seconds": middle, "seconds_low": low, "seconds_high": high}


def _slowest(seconds: float) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit_link(points: Sequence[Mapping[str, float]]) -> tuple[float, float, float]:
    """(latency_s of a call, bytes_per_s sent, median relative error) of points with `sent_bytes` and `seconds`.

    Relative errors count, so that a small size weighs as much as a large one (least_squares.py). Raises ValueError for
    fewer than two sizes.
    """
    if len({point["sent_bytes"] for point in points}) < 2:
        raise ValueError(f"points: got {len(points)}, expected at least two sizes")
    latency_s, s_per_byte = solve([[1.0, point["sent_bytes"]] for point in points], [p["seconds"] for p in points])
    errors = [abs((latency_s + s_per_byte * point["sent_bytes"]) / point["seconds"] - 1) for point in points]
    return latency_s, 1 / s_per_byte if s_per_byte else float("inf"), statistics.median(errors)


def read_collectives(path: Path) -> dict[str, Any]:
    """What --out has written. Raises CollectivesError where the file is another, or has no all-reduce of two sizes."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if len(found["ops"]["all_reduce"]["points"]) < 2:
            raise ValueError("too few sizes")
        len(found["hosts"]), int(found["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CollectivesError(
            f"{path}: holds no measured all-reduce ({error!r}); delete it to measure anew"
        ) from error
    return found


def table(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['world_size']} processes on {len(set(found['hosts']))} hosts, {found['backend']}, {found['device']}\n",
        "| | bytes | µs | middle half | bus MB/s | fitted µs |\n|-|-:|-:|-:|-:|-:|",
    ]
    for name, op in found["ops"].items():
        for point in op["points"]:
            fitted_s = op["latency_s"] + point["sent_bytes"] / op["bytes_per_s"]
            lines.append(
                f"| {name} | {point['bytes']:,} | {1e6 * point['seconds']:,.0f} "
                f"| {1e6 * point['seconds_low']:,.0f} to {1e6 * point['seconds_high']:,.0f} "
                f"| {1e-6 * point['sent_bytes'] / point['seconds']:,.0f} | {1e6 * fitted_s:,.0f} |"
            )
    for name, op in found["ops"].items():
        lines.append(f"\n{name}: {1e6 * op['latency_s']:,.0f} µs and {8e-6 * op['bytes_per_s']:,.0f} Mbit/s, "
                     f"{100 * op['fit_error']:.0f} % off in the median")  # fmt: skip
    lines += [f"\n{name}: left out: {why}" for name, why in found["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
