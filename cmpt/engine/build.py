"""Recipe -> DeepSpeed engine, in one place."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import nn

from cmpt.dist import process_group
from cmpt.engine.sharded import Average
from cmpt.models.clip import CLIP, layer_rates, parameter_groups
from cmpt.recipe.schema import Engine, Optimizer

__all__ = ["COMPUTE_DTYPES", "LossScale", "Trained", "build", "by_layer", "deepspeed_config"]

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GROWTH_STEPS = 2000


@dataclass
class LossScale:
    """What the loss is multiplied by, so that small fp16 gradients are not lost; 1 for other precisions.

    Halved when a gradient overflows, doubled after 2,000 steps without (mixed precision training, arXiv 1710.03740,
    section 3.2; torch.amp.GradScaler's constants).
    """

    value: float = 1.0
    clean_steps: int = 0

    def succeeded(self) -> None:
        self.clean_steps += 1
        if self.value > 1 and self.clean_steps >= _GROWTH_STEPS:
            self.value, self.clean_steps = self.value * 2, 0

    def failed(self) -> None:
        self.value, self.clean_steps = max(1.0, self.value / 2), 0


@dataclass
class Trained:
    """The model in training: DeepSpeed's engine and what cmpt keeps beside it."""

    engine: DeepSpeedEngine
    average: Average | None = None
    """EMA of the weights, with optimizer.ema_decay."""
    loss_scale: LossScale = field(default_factory=LossScale)

    @property
    def clip(self) -> CLIP:
        """The model inside the engine."""
        module: nn.Module = self.engine.module
        assert isinstance(module, CLIP)
        return module


def deepspeed_config(engine: Engine, world_size: int, elements: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a model of so many parameters; `engine.deepspeed` of the recipe is laid over it,
    section by section.

    Parameters stay fp32 and the towers run in `engine.precision` (models/transformer.py), so neither DeepSpeed's bf16
    and fp16 modes nor autocast are on: the temperature, the optimizer's state, and the accumulation and reduction of
    gradients are fp32 throughout. Clipping is done in engine/step.py, from a norm that is known already.
    """
    # Sharding over one process saves nothing and copies every parameter and gradient (a fifth of a ViT-B/16 step of 32
    # pairs on a CPU). Who offloads, or passes a section of their own, gets the stage that the recipe says.
    alone = world_size == 1 and not engine.offload_optimizer and "zero_optimization" not in engine.deepspeed
    stage = 0 if alone else engine.zero_stage
    overlap = stage > 1 if engine.overlap_communication is None else engine.overlap_communication
    # DeepSpeed takes all of a bucket, needed or not; it wants an even number.
    bucket = 2 * math.ceil(min(engine.bucket_elements, elements) / 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlap,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif stage in (1, 2):
        zero["compute_grad_norm"] = False  # ours is taken for every step
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # off; DeepSpeed's own default has been 1.0 since 0.19.3
        "zero_optimization": zero,
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


def by_layer(optimizer: Optimizer) -> bool:
    """Whether layers have learning rates, and so parameter groups, of their own."""
    return optimizer.vision_layer_decay != 1 or optimizer.text_layer_decay != 1


def build(clip: CLIP, engine: Engine, optimizer: Optimizer, world_size: int, device: torch.device) -> Trained:
    """DeepSpeed's engine around `clip`, with AdamW and cmpt's parameter groups (each with `name` and `lr_share`)."""
    clip.to(device)
    clip.compute_dtype = COMPUTE_DTYPES[engine.precision]
    layered = by_layer(optimizer)
    rates = layer_rates(clip, optimizer.vision_layer_decay, optimizer.text_layer_decay)
    groups = [
        {
            "params": list(parameters.values()),
            "name": name,
            "weight_decay": optimizer.weight_decay if name.endswith(".decay") else 0.0,
            "lr_share": rates[name] if layered else 1.0,
        }
        for name, parameters in parameter_groups(clip, layered).items()
    ]
    adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    built, *_ = deepspeed.initialize(
        model=clip,
        optimizer=adamw,
        model_parameters=clip.parameters(),
        config=deepspeed_config(engine, world_size, sum(parameter.numel() for parameter in clip.parameters())),
        dist_init_required=False,
    )
    if device.type == "cpu":
        _unname_buffers()
    if world_size == 1 and built.zero_optimization_stage() == 0:
        built.enable_backward_allreduce = False  # it would flatten, divide by one and copy back every gradient
    average = None if optimizer.ema_decay is None else Average(built, optimizer.ema_decay)
    return Trained(built, average, LossScale(2.0**16 if engine.precision == "fp16" else 1.0))


def _unname_buffers() -> None:
    """Let the memory of DeepSpeed's collectives on a CPU go with its processes.

    Each process of a host keeps 66 MiB in /dev/shm, named after MASTER_ADDR and MASTER_PORT, which DeepSpeed 0.19.8
    never removes, not even at its end: a study of 300 starts filled 22 GB. A file without a name lasts as long as
    somebody has it open, and all ranks have once they are here.
    """
    process_group.barrier()
    where = f"{os.environ.get('MASTER_ADDR', '')}_{os.environ.get('MASTER_PORT', '')}"
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{where}_{dist.get_rank()}").unlink(missing_ok=True)
