"""What DeepSpeed keeps in pieces: fp32 parameters, optimizer moments, reduced gradients, at any stage.

This is the only file that knows where DeepSpeed 0.19 holds its shards. At every stage a rank has a few flat fp32
tensors that the optimizer steps (`flat_parameters`), and a piece of some parameters lies at some place in them
(`pieces`). By parameter name and place, pieces of one world size and stage can be put together to those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from cmpt.dist.process_group import sum_over_ranks

PARAMETER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"
_NORM_ROW = 4096  # elements that are summed in fp32 before fp64 goes on


@dataclass(frozen=True)
class Piece:
    """Elements start … start + numel - 1 of a flattened parameter: `flat_parameters[flat][offset : offset + numel]`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        """This piece of tensors that are laid out as the flat parameters are."""
        return flats[self.flat].view(-1)[self.offset : self.offset + self.numel]


class Average:
    """An exponential moving average of this rank's flat parameters (EMA of the weights)."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        self.flats = [flat.detach().clone() for flat in flat_parameters(engine)]

    @torch.no_grad()
    def follow(self, engine: deepspeed.DeepSpeedEngine) -> None:
        """Move towards the weights after a step."""
        now = [flat.detach() for flat in flat_parameters(engine)]
        torch._foreach_lerp_(self.flats, now, 1 - self.decay)


def flat_parameters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The tensors that key the optimizer's state: parameters at stage 0, this rank's flat fp32 shards above."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def pieces(engine: deepspeed.DeepSpeedEngine) -> list[Piece]:
    """What this rank holds of the parameters; at stage 0, all of them."""
    stage = engine.zero_optimization_stage()
    found = []
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        if stage == 0:
            found.append(Piece(name, 0, parameter.numel(), number, 0))
        elif stage < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:
                within, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(Piece(name, within.start, within.numel, mapping.param_group_index, flat.start))
        else:
            optimizer, size = engine.optimizer, parameter.partition_numel()
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * size
            if start < parameter.ds_numel:
                found.append(Piece(name, start, min(size, parameter.ds_numel - start), group, offset))
    return found


def own_pieces(engine: deepspeed.DeepSpeedEngine) -> list[Piece]:
    """This rank's part when all ranks together go over every element once: at stage 0 an equal share."""
    held = pieces(engine)
    if engine.zero_optimization_stage():
        return held
    total, world, rank = sum(piece.numel for piece in held), dist.get_world_size(), dist.get_rank()
    first, last = rank * total // world, (rank + 1) * total // world
    found, begin = [], 0
    for piece in held:
        low, high = max(first, begin), min(last, begin + piece.numel)
        if low < high:
            found.append(replace(piece, start=low - begin, offset=low - begin, numel=high - low))
        begin += piece.numel
    return found


def shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Full shapes by parameter name."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def kept_tensors(engine: deepspeed.DeepSpeedEngine, average: Average | None) -> dict[str, list[Tensor]]:
    """All that a checkpoint keeps, laid out as the flat parameters; moments are zeros before the first step."""
    flats = [flat.detach() for flat in flat_parameters(engine)]
    state = _inner_optimizer(engine).state
    kept = {PARAMETER: flats}
    for moment in MOMENTS:
        held = [state[flat].get(moment) if flat in state else None for flat in flat_parameters(engine)]
        kept[moment] = [
            torch.zeros_like(flat) if value is None else value for flat, value in zip(flats, held, strict=True)
        ]
    if average is not None:
        kept[AVERAGE] = average.flats
    return kept


@torch.no_grad()
def fill(
    engine: deepspeed.DeepSpeedEngine, average: Average | None, steps: int, read: Callable[[str, Piece], Tensor]
) -> None:
    """Put other values into the engine; every rank calls it. `steps`: optimizer steps behind the moments.

    `read(kind, piece)` gives the elements of a piece, fp32 on the host; kinds are those of `kept_tensors`.
    """
    stage, inner = engine.zero_optimization_stage(), _inner_optimizer(engine)
    flats = flat_parameters(engine)
    for flat in flats:
        inner.state[flat] = {"step": torch.tensor(float(steps)), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if flat.is_cuda:  # the fused kernel wants its counter beside the parameter
            inner.state[flat]["step"] = inner.state[flat]["step"].to(flat.device)
    kept = kept_tensors(engine, average)
    for piece in pieces(engine):
        for kind, tensors in kept.items():
            piece.of(tensors).copy_(read(kind, piece))
    if stage in (1, 2):
        engine.optimizer.update_lp_params()  # what the towers compute with follows the masters
    elif stage == 3:
        optimizer = engine.optimizer
        optimizer._partition_all_parameters()
        for compute, master in zip(optimizer.fp16_partitioned_groups_flat, flats, strict=True):
            compute.data.copy_(master.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Optimizer steps that the moments have behind them."""
    states = _inner_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def loss_and_norms(
    engine: deepspeed.DeepSpeedEngine, local_loss: Tensor, scale: float
) -> tuple[float, dict[str, float]]:
    """The mean of the ranks' losses, and L2 norms of the global gradient / `scale`: by "visual", "text",
    "temperature", and "total".

    Collective, one small sum; call between backward and step, when DeepSpeed has reduced the gradients. Reads its
    result on the host, so that a step can be judged before it is taken.
    """
    groups = _inner_optimizer(engine).param_groups
    world = dist.get_world_size()
    sums = torch.zeros(1 + len(groups), dtype=torch.float64, device=engine.device)
    sums[0] = local_loss.detach() / world
    for number, gradients in _reduced_gradients(engine):
        sums[1 + number] += _sum_of_squares(gradients)
    if engine.zero_optimization_stage() == 0:
        sums[1:] /= world  # every rank has all of it
    loss, *squares = sum_over_ranks(sums).tolist()
    parts: dict[str, float] = {}
    for group, square in zip(groups, squares, strict=True):
        part = group["name"].split(".")[0]
        parts[part] = parts.get(part, 0.0) + square / scale**2
    parts["total"] = sum(parts.values())
    return loss, {part: square**0.5 for part, square in parts.items()}


def scale_gradients(engine: deepspeed.DeepSpeedEngine, factor: float) -> None:
    """Multiply the reduced gradients; between backward and step."""
    for _, gradients in _reduced_gradients(engine):
        torch._foreach_mul_(gradients, factor)


def step(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """The optimizer step, with the learning rate `lr` times each group's share."""
    for group in _inner_optimizer(engine).param_groups:
        group["lr"] = lr * group["lr_share"]
    engine.step()


def discard(engine: deepspeed.DeepSpeedEngine) -> None:
    """End a step without its effect: DeepSpeed does its housekeeping, weights and moments stay."""
    inner = _inner_optimizer(engine)
    inner.step = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        engine.step()
    finally:
        del inner.step


@contextmanager
def one_reduction(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """The gradients of all backward passes within add up and are reduced over ranks once, at the end."""
    if engine.zero_optimization_stage():
        with engine.coalesce_grad_reduction():
            yield
        return
    reduces = engine.enable_backward_allreduce
    engine.enable_backward_allreduce = False
    try:
        yield
    finally:
        engine.enable_backward_allreduce = reduces
    if reduces:
        engine.allreduce_gradients()


def _reduced_gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[int, list[Tensor]]]:
    """(parameter group, gradients): what this rank will step with; the whole gradient at stage 0."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for group, members in enumerate(optimizer.param_groups):
            yield group, [p.grad for p in members["params"] if p.grad is not None]
        return
    group_of = optimizer.sub_group_to_group_id if stage == 3 else {}
    if optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # DeepSpeed copies gradients to the host asynchronously
        for flat, parameter in enumerate(flat_parameters(engine)):
            if parameter.grad is not None:
                yield group_of.get(flat, flat), [parameter.grad]
        return
    for flat, gradients in optimizer.averaged_gradients.items():
        if gradients is not None:
            yield group_of.get(flat, flat), gradients


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """As exact as fp64 nearly, at the speed of fp32: rows in fp32, their sum in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = len(flat) // _NORM_ROW * _NORM_ROW
        total += torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1).double().pow(2).sum()
        total += flat[whole:].double().pow(2).sum()
    return total


def _inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer, under whatever DeepSpeed wrapped around it."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer
