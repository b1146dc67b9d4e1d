"""Recipe -> DeepSpeed engine, in one place."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from cmpt.models.clip import CLIP, parameter_groups
from cmpt.recipe.schema import Engine, Optimizer

__all__ = ["DeepSpeedEngine", "build_engine", "clip_of", "deepspeed_config"]


def deepspeed_config(engine: Engine, optimizer: Optimizer, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration; `engine.deepspeed` of the recipe is laid over it, section by section.

    Parameters stay fp32 and the towers run in `engine.precision` (models/transformer.py), so neither DeepSpeed's bf16
    mode nor autocast is on: the temperature, the optimizer's state and the gradient reduction are fp32 throughout.
    """
    # Sharding over one process saves nothing and copies every parameter and gradient (a fifth of a ViT-B/16 step of 32
    # pairs on a CPU). Who passes a section of their own, say for offloading, gets the stage that the recipe says.
    alone = world_size == 1 and "zero_optimization" not in engine.deepspeed
    stage = 0 if alone else engine.zero_stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # 0 is off. DeepSpeed's own default has been 1.0 since 0.19.3, so it is always said.
        "gradient_clipping": optimizer.clip_norm or 0.0,
        "zero_optimization": {"stage": stage, "overlap_comm": stage > 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    for key, value in engine.deepspeed.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = {**config[key], **value}
        else:
            config[key] = value
    return config


def build_engine(
    clip: CLIP, engine: Engine, optimizer: Optimizer, world_size: int, device: torch.device
) -> DeepSpeedEngine:
    """The DeepSpeed engine around `clip`, with AdamW and cmpt's parameter groups (each with its `name`)."""
    clip.to(device)
    clip.compute_dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    groups = [
        {
            "params": list(parameters.values()),
            "name": name,
            "weight_decay": optimizer.weight_decay if name.endswith(".decay") else 0.0,
        }
        for name, parameters in parameter_groups(clip).items()
    ]
    adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    built, *_ = deepspeed.initialize(
        model=clip,
        optimizer=adamw,
        model_parameters=clip.parameters(),
        config=deepspeed_config(engine, optimizer, world_size),
        dist_init_required=False,
    )
    if world_size == 1 and built.zero_optimization_stage() == 0:
        built.enable_backward_allreduce = False  # it would flatten, divide by one and copy back every gradient
    return built


def clip_of(engine: DeepSpeedEngine) -> CLIP:
    """The model inside the engine."""
    module: nn.Module = engine.module
    assert isinstance(module, CLIP)
    return module
