"""What is known of GPUs before one has them: NVIDIA's data sheets, and their memory as the driver reports it."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from cmpt.models.flops import PEAK_BF16

GIB = 2**30
MIB = 2**20
OPENCLIP_A100_MFU = 0.20
"""The middle of 9 to 30 %, OpenCLIP on A100."""
NEMO_H100_MFU = 0.21
"""NeMo CLIP on H100."""


@dataclass(frozen=True)
class Gpu:
    name: str
    peak_bf16_flops: float
    """Dense, per second (NVIDIA data sheet)."""
    peak_fp32_flops: float
    """Without tensor cores: torch's matrix products use no TF32 unless one asks for it, and cmpt does not (NVIDIA data
    sheet)."""
    memory_bytes: int
    """In all, as nvidia-smi reports it (public; not read here)."""
    memory_bytes_per_s: float
    """NVIDIA data sheet."""
    link_bytes_per_s: float
    """To the other GPUs of the node, one direction: half of the data sheet's NVLink figure; without NVLink, PCIe's."""
    host_bytes_per_s: float
    """To the host, one direction: PCIe x16 (NVIDIA data sheet)."""
    network_bits_per_s: float | None
    """Of one GPU's share of the node's network in NVIDIA's DGX of this card (its data sheet); None: there is none."""
    mfu: float
    """Share of the peak that a public figure of another trainer gives for CLIP."""
    mfu_source: str

    def peak_flops(self, precision: str) -> float:
        """Of engine.precision."""
        return self.peak_fp32_flops if precision == "fp32" else self.peak_bf16_flops


_A100 = "OpenCLIP on A100, 9 to 30 %"
_H100 = "NeMo CLIP on H100, 21 %"
_ELSEWHERE = "NeMo CLIP on H100, 21 %; no public figure for this card is used"
_PCIE_4, _PCIE_5 = 32e9, 64e9
# L40S, NVIDIA's data sheet: 362.05 TFLOP/s bf16 (733 with sparsity), 48 GB at 864 GB/s, PCIe Gen4 x16 of 64 GB/s both
# ways, no NVLink; 46,068 MiB are nvidia-smi's (akash-network/provider-configs, pull request 99).

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", PEAK_BF16["H200"], 67e12, 143_771 * MIB, 4.8e12, 450e9, _PCIE_5, 400e9, NEMO_H100_MFU, _ELSEWHERE),
        Gpu("h100", PEAK_BF16["H100"], 67e12, 81_559 * MIB, 3.35e12, 450e9, _PCIE_5, 400e9, NEMO_H100_MFU, _H100),
        Gpu(
            "a100", PEAK_BF16["A100"], 19.5e12, 81_920 * MIB, 2.039e12, 300e9, _PCIE_4, 200e9, OPENCLIP_A100_MFU, _A100
        ),
        Gpu(
            "a100-40",
            PEAK_BF16["A100"],
            19.5e12,
            40_960 * MIB,
            1.555e12,
            300e9,
            _PCIE_4,
            200e9,
            OPENCLIP_A100_MFU,
            _A100,
        ),
        Gpu("l40s", PEAK_BF16["L40S"], 91.6e12, 46_068 * MIB, 864e9, _PCIE_4, _PCIE_4, None, NEMO_H100_MFU, _ELSEWHERE),
        Gpu("b200", PEAK_BF16["B200"], 75e12, 183_359 * MIB, 8e12, 900e9, _PCIE_5, 400e9, NEMO_H100_MFU, _ELSEWHERE),
    )
}
ALIASES = {"a100-80": "a100"}


def find_gpu(name: str) -> Gpu:
    """Raises ValueError that names what is known."""
    lower = name.lower()
    lower = ALIASES.get(lower, lower)
    if lower in GPUS:
        return GPUS[lower]
    known = [*GPUS, *ALIASES]
    near = get_close_matches(lower, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"--gpu {name}: unknown; must be one of {', '.join(known)}{hint}")
