"""Facts about the machine's processor; `advise` adds rented accelerators."""

import os
import platform
from functools import cache
from pathlib import Path


@cache
def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in reversed(list(pairs))}


def cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware; without, bf16 is slower than fp32."""
    flags = (_cpu_info().get("flags") or _cpu_info().get("Features") or "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


# Peak dense TFLOP/s in bf16, from the makers' data sheets; matched against the name that the driver reports.
GPU_PEAK_BF16_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def gpu_peak_flops(name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that its driver reports; `None` where it is not known."""
    for part, tflops in GPU_PEAK_BF16_TFLOPS.items():
        if part in name:
            return tflops * 1e12
    return None
