"""The table of GPUs, and this machine."""

from __future__ import annotations

import pytest

from megatron_spdf.planning import hardware
from megatron_spdf.planning.hardware import GPUS, find_gpu, measure_this_machine, peak_flops

# TFLOP/s in bf16 and fp32, GiB, TB/s of memory, GB/s inside a node and out of it, of data sheets.
SHEETS = {"a100": (312, 19.5, 79.2, 2.039, 300, 25), "h100-pcie": (756, 51, 79.1, 2.0, 64, 25),
          "h100": (989, 67, 79.1, 3.35, 450, 50), "h200": (989, 67, 139.8, 4.8, 450, 50),
          "b200": (2250, 75, 178.4, 7.7, 900, 50), "mi300x": (1307, 163, 191.5, 5.3, 448, 50)}


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


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_those_of_the_data_sheets(name):
    gpu = GPUS[name]
    assert gpu.gpus_per_node == 8
    assert SHEETS[name] == pytest.approx((
        gpu.bf16 / 1e12, gpu.fp32 / 1e12, gpu.memory / 2**30, gpu.memory_bandwidth / 1e12,
        gpu.link / 1e9, gpu.network / 1e9))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_this_machine_is_measured(monkeypatch, precision):
    """A product of square matrices of 48 rows that takes 3 s, and a copy of 256 MiB that takes
    4."""
    took = []

    def seconds(work, at_least):
        if precision == "fp32":  # of few rows
            work()
        took.append(at_least)
        return 2.0 + len(took)

    monkeypatch.setattr(hardware, "_seconds", seconds)
    gpu = find_gpu("this-machine", precision) if precision == "bf16" else (
        measure_this_machine("fp32", size=48, seconds=0.25))
    size = 2048 if precision == "bf16" else 48
    assert took == [0.5, 0.5] if precision == "bf16" else [0.25, 0.25]
    assert gpu.fp32 == gpu.bf16 == 2 * size**3 / 3.0
    assert gpu.memory_bandwidth == 2 * 2**28 / 4.0 and gpu.gpus_per_node >= 1
    if gpu.name == "CPU":
        assert gpu.link == gpu.network == gpu.memory_bandwidth / 2
    assert gpu.memory > 2**30


@pytest.mark.parametrize(("at_least", "calls"), [(0.5, 1), (1.0, 1), (2.5, 3), (3.0, 3)])
def test_seconds_of_a_call_are_of_as_many_as_fill_the_time(monkeypatch, at_least, calls):
    """The first two, which are not counted, take longer."""
    clock, made = [0.0], []

    def work():
        made.append(None)
        clock[0] += 1.0 if len(made) > 2 else 50.0

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: clock[0])
    assert hardware._seconds(work, at_least) == 1.0
    assert len(made) == 2 + calls
