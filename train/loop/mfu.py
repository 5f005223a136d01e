"""Peak speeds of known devices, for the model FLOPs utilisation (Chowdhery et al., 2022)."""

from __future__ import annotations

import re

import torch

# Dense tensor-core peak in bf16 or fp16, and in fp32 without tensor cores, in TFLOP/s, from the
# makers' data sheets. The first entry whose words are in the device's name counts.
_PEAK_TFLOPS: list[tuple[str, float, float]] = [
    ("H200", 989.0, 67.0),
    ("GH200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("T4", 65.0, 8.1),
    ("V100", 125.0, 15.7),
]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak floating point operations per second of a device, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, half, single in _PEAK_TFLOPS:
        if re.search(rf"\b{known}\b", name):  # not an L4 for an L40, nor a T4 for a T400
            return 1e12 * (single if precision == "fp32" else half)
    return None
