"""Triton's kernels as machine code for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled import AMPERE, HOPPER
from packaging.version import Version
from small_masks import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels.mask import SPAN  # noqa: E402
from megatron_spdf.kernels.program_shapes import WARPS  # noqa: E402

pytestmark = pytest.mark.slow

KIB = 2**10
SHARED = 227 * KIB  # of a Hopper multiprocessor
SMALLEST_SHARED = 99 * KIB  # that a program may have on the GPUs of compute capability 8.6 and 8.9


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """All kernels, with an own name for each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", Path(__file__).with_name("compiled.py"),
                           tmp_path_factory.mktemp("cubins")], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {" ".join(str(k[word])
                     for word in ("kernel", "size", "target", "dtype", "shape", "options")
                     if word in k): k
            for k in json.loads(done.stdout)}


def some(kernels, **wanted) -> dict[str, dict]:
    found = {name: k for name,
             k in kernels.items() if all(k.get(word) == value for word, value in wanted.items())}
    assert found, wanted
    return found


def count(kernel: dict, *begins: str) -> int:
    return sum(n for name, n in kernel["instructions"].items() if name.startswith(begins))


def test_hardly_a_register_is_spilled_and_shared_memory_suffices(kernels):
    """On an H100 the weight gradient of 128 x 128 by four warps is the fastest, although the
    addresses of its result are spilled."""
    for name, k in some(kernels, dtype="bf16").items():
        assert k["stack"] <= 64, name
        assert k["shared"] <= SHARED, name


def test_what_is_taken_fits_on_gpus_with_little_shared_memory(kernels):
    for name, k in {**some(kernels, target=AMPERE), **some(kernels, dtype="fp32")}.items():
        assert k["shared"] <= SMALLEST_SHARED, name


def test_products_are_those_of_tensor_cores(kernels):
    products = {name: k for name, k in kernels.items() if k.get("size")}
    for name, k in some(products, dtype="bf16", target=HOPPER).items():
        # the warp group's, not a warp's
        assert count(k, "HGMMA.64x") and not count(k, "HMMA", "FFMA"), name
    for name, k in some(products, dtype="bf16", target=AMPERE).items():
        assert count(k, "HMMA") and not count(k, "FFMA"), name
    for name, k in some(products, dtype="fp32").items():
        assert count(k, "FFMA") and not count(k, "HMMA", "HGMMA"), name  # TF32 has 11 bits


def test_operands_of_products_come_16_bytes_at_a_time_past_the_registers(kernels):
    for name, k in ((name, k) for name, k in kernels.items() if k.get("size")):
        if k["shape"][-1]:  # by blocks: no thread has a part in it
            assert count(k, "UTMALDG") and count(k, "UTMASTG"), name
            assert not count(k, "LDGSTS", "STG"), name
            continue
        asynchronous = count(k, "LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.LTC128B.128")
        table = 0 if k["kernel"] == "weight_gradient" else asynchronous / 2
        assert asynchronous and count(k, "LDGSTS") - asynchronous <= table, name
        assert count(k, "STG") == count(k, "STG.E.128"), name


def test_dense_weights_move_16_bytes_at_a_time(kernels):
    for name, k in some(kernels, kernel="expand").items():
        assert count(k, "STG") == count(k, "STG.E.128") > 0, name
    for name, k in some(kernels, kernel="compress").items():
        assert count(k, "LDG.E.EF.128") > 0, name


def test_what_is_selected_from_comes_8_bytes_at_a_time_and_is_counted_by_votes(kernels):
    for kernel in ("count", "write"):
        for name, k in some(kernels, kernel=kernel).items():
            assert count(k, "LDG.E.64", "LDG.E.128") > 0, name
            assert k["stack"] <= 8, name
            # By atomics, as Triton 3.9 counts, entries with one digit wait for each other. PyTorch
            # 2.13 brings 3.7.
            if kernel == "count" and Version(version("triton")) < Version("3.9"):
                assert count(k, "VOTE") > 10 * count(k, "ATOMS") > 0, name


def test_rows_move_16_bytes_at_a_time(kernels):
    """Whatever the vocabulary, whose end need not lie on 16 bytes."""
    for kernel in ("sums", "gradient", "backward"):
        for name, k in some(kernels, kernel=kernel).items():
            assert count(k, "LDG.E.128") > 0, name
            assert count(k, "STG") == count(k, "STG.E.128") > 0 or kernel == "sums", name


@pytest.mark.skipif(Version(version("triton")) < Version("3.7"),
                    reason="of compress Triton 3.6 makes more than the release that is pinned")
def test_instructions_leave_expanding_and_compressing_seven_tenths_of_the_memory_s_speed(kernels):
    """A Hopper multiprocessor begins an instruction of four warps a cycle; each is for 32
    entries."""
    # of an H200's memory, by multiprocessor; NVIDIA's data sheet
    bytes_a_cycle = 0.7 * 4.8e12 / 132 / 1.755e9
    # at 75%, bf16
    for kernel, bytes_an_entry in (("expand", 2 + 2 / 4 + 1 / 8), ("compress", 2 + 8 / 4 + 1 / 8)):
        options = {"num_warps": WARPS[kernel][0]}
        for name, k in some(kernels, kernel=kernel, options=options, target=HOPPER,
                            dtype="bf16").items():
            of_a_thread = SPAN / (32 * options["num_warps"])
            assert (
                sum(k["instructions"].values()) / of_a_thread
                <= 4 * 32 * bytes_an_entry / bytes_a_cycle
            ), name
