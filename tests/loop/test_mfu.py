"""Peak FLOP/s of devices, by the names that CUDA reports."""

from __future__ import annotations

import pytest
import torch

from train.loop.mfu import peak_flops

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        # Not in the table, although names in the table start in the same way.
        ("NVIDIA L40", None, None),
        ("NVIDIA T400 4GB", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_peak_by_device_name(
    monkeypatch: pytest.MonkeyPatch, name: str, half: float | None, single: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, "bf16") == peak_flops(CUDA, "fp16") == half
    assert peak_flops(CUDA, "fp32") == single


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
