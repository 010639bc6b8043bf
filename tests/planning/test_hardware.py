"""The table of GPUs, and this machine."""

from __future__ import annotations

import pytest

from megatron_spdf.planning.hardware import GPUS, find_gpu, measure_this_machine, peak_flops


@pytest.mark.parametrize(("device", "name"), [
    ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
    ("AMD Instinct MI300X", "mi300x")])
def test_device_names_of_pytorch(device, name):
    assert (peak_flops(device, "bf16"), peak_flops(device, "fp32")) == (GPUS[name].bf16,
                                                                        GPUS[name].fp32)


def test_other_devices_have_no_peak():
    assert peak_flops("NVIDIA GeForce RTX 4090", "bf16") is None


def test_figures_can_be_given():
    gpu = find_gpu("h100", "bf16", memory=64 * 2**30, network=1e9, gpus_per_node=4)
    assert (gpu.memory, gpu.network, gpu.gpus_per_node) == (64 * 2**30, 1e9, 4)
    assert gpu.link == GPUS["h100"].link and gpu.peak("fp32") < gpu.peak("bf16")


def test_unknown_gpus_are_named():
    with pytest.raises(ValueError, match="'h300' is not in the table; known: a100, .*this-machine"):
        find_gpu("h300", "bf16")


def test_this_machine_is_measured():
    gpu = measure_this_machine("fp32", size=256, seconds=0.05)
    assert 1e8 < gpu.fp32 < 1e16 and 1e8 < gpu.memory_bandwidth < 1e14
    assert gpu.memory > 2**30 and gpu.gpus_per_node >= 1
