"""The chunked losses against the plain ones: seconds, memory, accuracy, and the bytes that ranks send each other:

    python tools/bench_loss.py [--batch 32768] [--dim 512] [--chunk-rows 1024] [--against plain|nothing] [--repeats 1]

Everything is fp32, forward and backward, in one process on one device. Memory is the peak above the inputs (the
embeddings), gradients included, each way in a process of its own: on a CPU its resident memory (Linux), on CUDA what
torch allocated. Where the plain way would not fit, it is measured at a smaller batch, and the line says so. Accuracy is
against the plain way in float64. Bytes are those of the embeddings and their gradient, by the ring algorithm
(cmpt/dist/traffic.py), for one step of one rank.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from cmpt.dist import process_group, traffic
from cmpt.losses.contrastive import info_nce
from cmpt.losses.sigmoid import sigmoid_loss
from cmpt.monitor.meters import peak_memory_bytes, proc_bytes

LOSSES = ("infonce", "sigmoid")
WORLD_SIZES = (1, 8, 64, 512)
ACCURACY_BATCH = 1024
PLAIN_MATRICES = 5
"""Matrices of [G, G] that the plain losses hold at their peak, rounded up."""
SHARE_OF_FREE = 0.7
"""No more than this of the free memory is taken."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32768, help="global batch G (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=512, help="embedding width (default: %(default)s)")
    parser.add_argument("--chunk-rows", type=int, default=1024, help="loss.chunk_rows (default: %(default)s)")
    parser.add_argument("--against", choices=["plain", "nothing"], default="plain")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes; the median counts (default: %(default)s)")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # "infonce chunked": measure here, print JSON
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(measured_here(options)))
        return 0
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"G {options.batch:,}, d {options.dim}, fp32, {name}, torch {torch.__version__}, chunk_rows "
          f"{options.chunk_rows}, median of {options.repeats}; float64 at G {small_batch(options):,}\n")  # fmt: skip
    for loss in LOSSES:
        print(loss)
        show(options, loss, "chunked", options.batch)
        if options.against == "plain":
            show(options, loss, "plain", fitting_batch(options))
    show_traffic(options)
    return 0


def show(options: argparse.Namespace, loss: str, way: str, batch: int) -> None:
    seconds, peak_bytes = measure(loss, way, batch, options.dim, options.chunk_rows, options.repeats)
    apart = ", ".join(f"{name} {value:.1e}" for name, value in difference(loss, way, options).items())
    at = "" if batch == options.batch else f" at G {batch:,}"
    print(f"  {way + at:18} {seconds:9.2f} s {peak_bytes / 1e6:9.0f} MB   from float64: {apart}", flush=True)


def fitting_batch(options: argparse.Namespace) -> int:
    """The batch, halved until the plain way fits into free memory; says so if that is another one."""
    free, batch = free_bytes(), options.batch
    while PLAIN_MATRICES * 4 * batch**2 > SHARE_OF_FREE * free:
        batch //= 2
    if batch != options.batch:
        needs = PLAIN_MATRICES * 4 * options.batch**2 / 1e9
        print(f"  plain: not run, needs {needs:.0f} GB, {free / 1e9:.0f} GB are free")
    return batch


def free_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return proc_bytes("meminfo", "MemAvailable")


def inputs_of(batch: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """image_GE, text_GE, where pairs have a cosine near 0.24, as after some training; scale, bias."""
    generator = torch.Generator().manual_seed(0)
    image_GE = torch.randn(batch, dim, generator=generator)
    text_GE = F.normalize(image_GE + 4 * torch.randn(batch, dim, generator=generator), dim=1)
    values = [F.normalize(image_GE, dim=1), text_GE, torch.tensor([20.0]), torch.tensor([-10.0])]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [value.to(device, dtype).requires_grad_() for value in values]


def way_of(loss: str, way: str, chunk_rows: int) -> Callable[..., Tensor]:
    if way == "plain":
        return plain_infonce if loss == "infonce" else plain_sigmoid
    if loss == "sigmoid":
        return functools.partial(sigmoid_loss, chunk_rows=chunk_rows)
    return functools.partial(chunked_infonce, chunk_rows=chunk_rows)


def chunked_infonce(image_GE: Tensor, text_GE: Tensor, scale: Tensor, bias: Tensor, chunk_rows: int) -> Tensor:
    return info_nce(image_GE, text_GE, image_GE, text_GE, scale, chunk_rows=chunk_rows)


def plain_infonce(image_GE: Tensor, text_GE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image_GE @ text_GE.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_sigmoid(image_GE: Tensor, text_GE: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image_GE @ text_GE.T + bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def small_batch(options: argparse.Namespace) -> int:
    return min(ACCURACY_BATCH, options.batch)


def difference(loss: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Relative distance from float64 at a smaller batch: of the loss, and the largest of any gradient (L2)."""
    batch = small_batch(options)
    found, exact = (inputs_of(batch, options.dim, dtype) for dtype in (torch.float32, torch.float64))
    for mine, its in zip(found, exact, strict=True):
        its.data.copy_(mine.data)
    ours = way_of(loss, way, options.chunk_rows)(*found)
    truth = way_of(loss, "plain", 0)(*exact)
    ours.backward()
    truth.backward()
    gradients = [
        float((mine.grad - its.grad).norm() / its.grad.norm())
        for mine, its in zip(found, exact, strict=True)
        if mine.grad is not None and its.grad is not None
    ]
    return {"loss": abs(ours.item() - truth.item()) / abs(truth.item()), "gradients": max(gradients)}


def measure(loss: str, way: str, batch: int, dim: int, chunk_rows: int, repeats: int = 1) -> tuple[float, int]:
    """(seconds, peak bytes above the inputs) of forward and backward, in a process of its own."""
    sizes = {"batch": batch, "dim": dim, "chunk-rows": chunk_rows, "repeats": repeats}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, __file__, f"--only={loss} {way}", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak_bytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak_bytes


def measured_here(options: argparse.Namespace) -> tuple[float, int]:
    loss, way = options.only.split()
    step = way_of(loss, way, options.chunk_rows)
    step(*inputs_of(256, options.dim)).backward()  # so that what libraries take once is taken
    inputs, device = inputs_of(options.batch, options.dim), inputs_of(1, 1)[0].device
    before = start_peak()
    took = []
    for _ in range(options.repeats):
        for value in inputs:
            value.grad = None
        began = now(device)
        step(*inputs).backward()
        took.append(now(device) - began)
    return statistics.median(took), peak_memory_bytes() - before


def now(device: torch.device) -> float:
    """Seconds, once all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak() -> int:
    """Forget the peak so far: bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return proc_bytes("self/status", "VmRSS")


def show_traffic(options: argparse.Namespace) -> None:
    print("\nMB that one rank sends per step for the features, by arithmetic (NCCL)")
    print(f"  {'world size':12}" + "".join(f"{world:>10,}" for world in WORLD_SIZES))
    for loss in LOSSES:
        sent = [traffic.feature_bytes(options.batch, options.dim, loss, world) / 1e6 for world in WORLD_SIZES]
        print(f"  {loss:12}" + "".join(f"{megabytes:10.1f}" for megabytes in sent))
    batch = small_batch(options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"  two processes (gloo), G {batch:,}: bytes counted, by arithmetic", flush=True)
    torch.multiprocessing.spawn(count_in_process, (port, batch, options.dim, options.chunk_rows), nprocs=2)


def count_in_process(rank: int, port: int, batch: int, dim: int, chunk_rows: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    process_group.start()
    rows = slice(rank * batch // 2, (rank + 1) * batch // 2)
    gather = process_group.gather_with_gradient
    for loss in LOSSES:
        image_GE, text_GE, scale, bias = (value.detach().cpu().requires_grad_() for value in inputs_of(batch, dim))
        image_BE, text_BE = image_GE[rows], text_GE[rows]
        traffic.take()
        if loss == "infonce":
            both_GE = (gather(image_BE), gather(text_BE))
            value = info_nce(image_BE, text_BE, *both_GE, scale, first_row=rows.start, chunk_rows=chunk_rows)
        else:
            value = sigmoid_loss(image_BE, gather(text_BE), scale, bias, first_row=rows.start, chunk_rows=chunk_rows)
        value.backward()
        if rank == 0:
            expected = traffic.feature_bytes(batch, dim, loss, world_size=2, nccl=False)
            print(f"  {loss:12}{traffic.take()['features']:14,}{expected:14,}", flush=True)
    process_group.stop()


if __name__ == "__main__":
    sys.exit(main())
