"""GPUs as the planner sees them: rates and sizes from their makers' data sheets, or measured on
this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Literal

from megatron_spdf.tables import GIB

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual server.

    Attributes:
        name: as it occurs in the device name that PyTorch reports.
        bf16, fp32: peak rates of dense matrix products, FLOP/s; fp32 without TF32, as PyTorch
            computes by default.
        memory: bytes, as PyTorch reports them.
        memory_bandwidth: bytes/s.
        link: bytes/s that it can send to the other GPUs of the node.
        network: bytes/s that it can send to other nodes; one network card for each GPU.
        gpus_per_node: GPUs behind `link`.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    gpus_per_node: int = 8

    def peak(self, precision: Precision) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


# Data sheets: NVIDIA A100 80GB SXM, H100 SXM and PCIe, H200 SXM, HGX B200; AMD MI300X. Network: 200
# Gb/s a GPU in DGX A100, 400 Gb/s in DGX H100, H200 and B200 and their like.
GPUS = {
    "a100": Gpu("A100", 312e12, 19.5e12, 79.2 * GIB.size, 2.039e12, 300e9, 25e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 51e12, 79.1 * GIB.size, 2.0e12, 64e9, 25e9),
    "h100": Gpu("H100", 989e12, 67e12, 79.1 * GIB.size, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200", 989e12, 67e12, 139.8 * GIB.size, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200", 2250e12, 75e12, 178.4 * GIB.size, 7.7e12, 900e9, 50e9),
    "mi300x": Gpu("MI300X", 1307e12, 163e12, 191.5 * GIB.size, 5.3e12, 448e9, 50e9),
}
THIS_MACHINE = "this-machine"


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak rate of the GPU whose name contains a known one; None for any other device."""
    return next((gpu.peak(precision) for gpu in GPUS.values() if gpu.name in device_name), None)


def find_gpu(
    name: str, precision: Precision, memory: float | None = None, network: float | None = None,
    gpus_per_node: int | None = None,
) -> Gpu:
    """A GPU of the table, or this machine's device, measured.

    Args:
        memory, network, gpus_per_node: in place of the table's.

    Raises:
        ValueError: naming the GPUs that are known.
    """
    if name == THIS_MACHINE:
        gpu = measure_this_machine(precision)
    elif name in GPUS:
        gpu = GPUS[name]
    else:
        raise ValueError(f"gpu={name!r} is not in the table; known: {', '.join(GPUS)}, and "
                         f"{THIS_MACHINE}, which is measured")
    changes = {"memory": memory, "network": network, "gpus_per_node": gpus_per_node}
    return replace(gpu, **{k: v for k, v in changes.items() if v is not None})


def measure_this_machine(precision: Precision, size: int = 2048, seconds: float = 0.5) -> Gpu:
    """Rates of this machine's first GPU, or of its CPU as one process uses it.

    On a CPU ranks reach each other through memory: half its copy bandwidth stands for link and
    network.

    Args:
        size: of the square matrices that are multiplied.
        seconds: that each measurement takes at least.
    """
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, out = torch.randn((2, size, size), device=device).to(dtype)
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * size**3 / _seconds(lambda: torch.matmul(a, a, out=out), seconds)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), seconds)
    if cuda:
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        known = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
        link, network = (known.link, known.network) if known else (copied / 2, copied / 2)
        return Gpu(name, rate, rate, total, copied, link, network, torch.cuda.device_count())
    return Gpu("CPU", rate, rate, psutil.virtual_memory().total, copied, copied / 2, copied / 2,
               os.cpu_count() or 1)


def _seconds(work, at_least: float) -> float:
    """Seconds of one call, from as many as fill the time, the first two not counted."""
    import torch

    def ready() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):
        work()
    calls, started = 0, ready()
    while (spent := ready() - started) < at_least or calls == 0:
        work()
        calls += 1
    return spent / calls
