"""Expand and compress, PyTorch's and Triton's, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_masks import DEVICE, NO_TRITON, TOLERANCE, make_mask, random_slices, whole
from torch import Tensor

from megatron_spdf.kernels import torch_reference
from megatron_spdf.kernels.mask import SPAN

each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


# in Triton's interpreter a test takes a second
@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.slow)])
def module(request):
    """The implementation."""
    if request.param == "torch":
        return torch_reference
    pytest.importorskip("triton", reason=NO_TRITON)
    from megatron_spdf.kernels import triton_compact

    return triton_compact


def with_empty_and_full_rows() -> np.ndarray:
    active = np.zeros((2, 6, 40), bool)
    active[0, 1], active[0, 4, 3:7], active[1, 5], active[1, 0, :4] = True, True, True, True
    return active


MASKS = {
    "one entry": np.ones((1, 1, 1), bool),
    "one of many": random_slices(3, 5, 7, 1),
    "odd": random_slices(3, 13, 11, 40),
    "several spans": random_slices(2, 37, 91, 800),
    "exactly a span": random_slices(2, 32, SPAN // 32, 256),
    "all active": np.ones((2, 5, 9), bool),
    "empty and full rows": with_empty_and_full_rows(),
    "empty spans": np.concatenate([np.ones((1, 1, 8), bool), np.zeros((1, 1, 3 * SPAN), bool)],
                                  axis=2),
}
each_mask = pytest.mark.parametrize("active", MASKS.values(), ids=MASKS)
each_axis = pytest.mark.parametrize("axis", [0, 1])


@each_axis
@each_mask
def test_expanded_is_the_values_at_the_active_entries(module, axis, active):
    mask = make_mask(active, axis, module)
    values = torch.randn(mask.slices, mask.active, device=DEVICE)
    slices = np.zeros(active.shape, np.float32)
    slices[active] = values.cpu().numpy().ravel()
    assert np.array_equal(module.expand(values, mask).cpu().numpy(), whole(slices, axis))


@each_axis
@each_mask
def test_compressed_is_the_active_entries(module, axis, active):
    mask = make_mask(active, axis, module)
    dense = torch.randn(mask.shape, device=DEVICE)
    slices = np.stack(np.split(dense.cpu().numpy(), len(active), axis))
    assert np.array_equal(module.compress(dense, mask).cpu().numpy().ravel(), slices[active])


@each_dtype
@each_axis
def test_dtypes_are_kept(module, dtype, axis):
    active = random_slices(2, 19, 23, 100)
    mask = make_mask(active, axis, module)
    dense = torch.randn(mask.shape, device=DEVICE).to(dtype)
    values = module.compress(dense, mask)
    there = torch.from_numpy(whole(active, axis)).to(DEVICE)
    assert values.dtype is dtype and values.shape == (mask.slices, mask.active)
    assert torch.equal(module.expand(values, mask),
                       torch.where(there, dense, torch.zeros((), dtype=dtype)))


@each_dtype
def test_compress_adds_in_the_precision_of_what_it_adds_to(module, dtype):
    mask = make_mask(random_slices(2, 19, 23, 100), 1, module)
    dense = torch.randn(mask.shape, device=DEVICE).to(dtype)
    before = torch.randn(mask.slices, mask.active, device=DEVICE)
    # with what does not belong to it
    buffer = torch.cat([before.flatten(), torch.full((7,), 5.0, device=DEVICE)])
    out = buffer[: before.numel()].view(before.shape)
    assert module.compress(dense, mask, out) is out
    assert torch.equal(out, before + module.compress(dense, mask).float())
    assert (buffer[before.numel():] == 5.0).all()


def strided(kind: str, shape: tuple[int, int]) -> Tensor:
    if kind == "transposed":
        return torch.randn(shape[::-1], device=DEVICE).T
    if kind == "every second":
        return torch.randn(2 * shape[0], 2 * shape[1], device=DEVICE)[::2, 1::2]
    return torch.randn(shape[0], 1, device=DEVICE).expand(shape)


@each_axis
@pytest.mark.parametrize("kind", ["transposed", "every second", "one column"])
def test_dense_weights_need_not_be_contiguous(module, axis, kind):
    mask = make_mask(random_slices(3, 13, 11, 40), axis, module)
    dense = strided(kind, mask.shape)
    assert torch.equal(module.compress(dense, mask), module.compress(dense.contiguous(), mask))


def test_values_need_not_be_contiguous(module):
    mask = make_mask(random_slices(3, 13, 11, 40), 0, module)
    values = torch.randn(40, 3, device=DEVICE).T
    assert torch.equal(module.expand(values, mask), module.expand(values.contiguous(), mask))
