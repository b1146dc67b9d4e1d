"""The fused kernels compile for Hopper (sm_90) and fit it; no GPU is needed, Triton brings the assembler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import pytest

SHARED_BYTES = 227 * 1024  # that one program may use on an H100 or H200
PATCH_SIZES = {8: 96, 14: 224, 16: 224, 32: 224}  # with an image size for each


def compiled_by(patch: int, anchors: int) -> list[dict[str, Any]]:
    """Runs the public functions on tensors of the CPU, with every launch made a compilation for sm_90."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from cmpt.masking import fused

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {name.lower(): int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
        instructions = sorted(set(re.findall(r"\b(wgmma\.mma_async\S+|cvt\.\w+\.bf16\S*)", kernel.asm["ptx"])))
        name, shared = kernel.metadata.name, kernel.metadata.shared
        kernels.append({"name": name, "shared": shared, "instructions": instructions, **usage})

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    size = PATCH_SIZES[patch]
    patches = (size // patch) ** 2
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    images_BCHW = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    ordinal_B = torch.arange(2)
    fused.draw_anchors(ordinal_B, 2**63 + 1, patches, 5)
    anchors_BK = torch.zeros(2, anchors, dtype=torch.int32)
    similarity_BL = fused.anchor_similarity(images_BCHW, anchors_BK, patch, mean, std)
    valid_B = torch.ones(2, dtype=torch.bool)
    keep_BL, kept_B = fused.keep_patches(similarity_BL, ordinal_B, 1, 0.5, 0.3, valid_B)
    keep_BL, kept_B = torch.ones_like(keep_BL), torch.full_like(kept_B, patches)
    fused.gather_patches(images_BCHW, keep_BL, kept_B, patch, mean, std, 2 * patches, torch.bfloat16)
    return kernels


@pytest.mark.parametrize(
    ("patch", "anchors"),
    [
        *((8, 5), (14, 64), (16, 5), (32, 64)),
        *(
            pytest.param(patch, anchors, marks=pytest.mark.slow)
            for patch, anchors in ((8, 64), (14, 5), (16, 64), (32, 5))
        ),
    ],
)
def test_every_kernel_compiles_for_sm_90_without_spilling(patch: int, anchors: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(patch), str(anchors)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = {kernel["name"]: kernel for kernel in json.loads(done.stdout.splitlines()[-1])}
    names = {"anchors_kernel", "similarity_kernel", "keep_kernel", "places_kernel", "gather_kernel"}
    assert set(kernels) == names
    for kernel in kernels.values():
        assert kernel["shared"] <= SHARED_BYTES
        assert kernel["local"] == 0 and kernel["stack"] == 0, kernel
    assert all(name.endswith(".s32.s8.s8") for name in kernels["similarity_kernel"]["instructions"])
    assert kernels["similarity_kernel"]["instructions"], "products do not run on tensor cores"
    assert all(name.startswith("cvt.rn.bf16") for name in kernels["gather_kernel"]["instructions"])
    assert kernels["gather_kernel"]["instructions"]


if __name__ == "__main__":
    print(json.dumps(compiled_by(int(sys.argv[1]), int(sys.argv[2]))))
