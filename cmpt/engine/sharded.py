"""What DeepSpeed keeps in pieces, seen whole: fp32 parameters, optimizer moments, and gradient norms, at any stage.

This is the only file that knows where DeepSpeed 0.19 holds its shards. Values go in and out by parameter name, as full
tensors, so a checkpoint made of them loads at any world size and any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, {"param", "exp_avg", "exp_avg_sq"}) of every parameter: full fp32 host tensors.

    Collective: every rank iterates to the end. Before the first optimizer step there are no moments: zeros.
    """
    stage = engine.zero_optimization_stage()
    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        values: dict[str, Tensor] = {}
        if stage == 0:
            state = _inner_optimizer(engine).state.get(parameter, {})
            values["param"] = parameter.detach()
            for moment in MOMENTS:
                values[moment] = state.get(moment, torch.zeros_like(parameter))
        else:
            values["param"] = safe_get_full_fp32_param(parameter)
            for moment in MOMENTS:
                values[moment] = (
                    safe_get_full_optimizer_state(parameter, moment)
                    if optimizer_steps(engine) > 0
                    else torch.zeros_like(values["param"])
                )
        yield name, {key: value.detach().float().cpu().clone() for key, value in values.items()}


def load_full_state(engine: deepspeed.DeepSpeedEngine, state: dict[str, dict[str, Tensor]], steps: int) -> None:
    """The reverse of `full_state`; `steps`: optimizer steps behind the moments. Every rank has all of `state`."""
    stage = engine.zero_optimization_stage()
    inner = _inner_optimizer(engine)
    for flat in _flat_parameters(engine):
        inner.state[flat] = {
            "step": torch.tensor(float(steps)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
        if flat.is_cuda:  # the fused kernel wants its counter beside the parameter
            inner.state[flat]["step"] = inner.state[flat]["step"].to(flat.device)
    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        values = {key: value.to(engine.device) for key, value in state[name].items()}
        if stage < 3:
            parameter.data.copy_(values["param"])
        if stage == 0:
            for moment in MOMENTS:
                inner.state[parameter][moment].copy_(values[moment])
        elif stage < 3:
            safe_set_full_fp32_param(parameter, values["param"])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, values[moment], moment)
        else:
            safe_set_local_fp32_param(parameter, _own_part(parameter, values["param"]))
            for moment in MOMENTS:
                safe_set_local_optimizer_state(parameter, _own_part(parameter, values[moment]), moment)
    if stage == 3:
        _refresh_partitions(engine)


def optimizer_steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Optimizer steps that the moments have behind them."""
    states = _inner_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def gradient_norms(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """L2 norms of the global gradient by part: "visual", "text", "temperature" and "total"; before clipping.

    Collective; call between backward and step, when DeepSpeed has reduced the gradients.
    """
    groups = _inner_optimizer(engine).param_groups
    squares = torch.zeros(len(groups), dtype=torch.float64, device=engine.device)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        for i, group in enumerate(groups):
            squares[i] += _sum_of_squares([p.grad for p in group["params"] if p.grad is not None])
    else:
        group_of = getattr(engine.optimizer, "sub_group_to_group_id", None) if stage == 3 else None
        for i, gradients in engine.optimizer.averaged_gradients.items():
            if gradients is not None:
                squares[group_of[i] if group_of is not None else i] += _sum_of_squares(gradients)
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
    parts: dict[str, float] = {}
    for group, square in zip(groups, squares.tolist(), strict=True):
        part = group["name"].split(".")[0]
        parts[part] = parts.get(part, 0.0) + square
    parts["total"] = sum(parts.values())
    return {part: square**0.5 for part, square in parts.items()}


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


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in _inner_optimizer(engine).param_groups:
        group["lr"] = lr


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.double().pow(2).sum() for t in tensors] or [torch.zeros((), dtype=torch.float64)]).sum()


def _inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer, under whatever DeepSpeed wrapped around it."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _flat_parameters(engine: deepspeed.DeepSpeedEngine) -> list[nn.Parameter]:
    """The tensors that key the optimizer's state: parameters at stage 0, this rank's flat fp32 shards above."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _link_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Stages 1 and 2: let every parameter find its piece of the moments.

    DeepSpeed 0.19.8 does this once, after the step of the first parameter group, when the others have no moments yet.
    """
    if 0 < engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _own_part(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Stage 3: this rank's part of a full tensor, zeros where the last part reaches beyond its end.

    DeepSpeed's own setter of full values fails on tensors that the world size does not divide.
    """
    size = safe_get_local_fp32_param(parameter).numel()
    world, rank = dist.get_world_size(), dist.get_rank()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    return padded[rank * size : (rank + 1) * size]


def _refresh_partitions(engine: deepspeed.DeepSpeedEngine) -> None:
    """Stage 3: the compute copies of this rank's shards follow the fp32 masters."""
    optimizer = engine.optimizer
    for compute, master in zip(
        optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        compute.data.copy_(master.data)
