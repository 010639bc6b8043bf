"""Triton's kernels, on a GPU or in Triton's interpreter, and PyTorch's, against NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_spdf import kernels
from megatron_spdf.kernels import torch_reference
from megatron_spdf.kernels.mask import SPAN, Mask, find_blocks

triton = pytest.importorskip("triton", reason="triton is not installed; PyTorch for CUDA brings it")
from megatron_spdf.kernels import triton_blocks, triton_compact  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = {"torch": torch_reference, "triton": triton_compact}
# The unit in the last place of a result, relative: sums are fp32 and rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
each_implementation = pytest.mark.parametrize("module", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def make_mask(active: np.ndarray, axis: int, module, size: int | None = None) -> Mask:
    """Of chunks (C, rows, columns) bool with equally many active entries."""
    chunks, rows, columns = active.shape
    bits = torch.from_numpy(np.packbits(active.reshape(chunks, -1), axis=1)).to(DEVICE)
    shape = (chunks * rows, columns) if axis == 0 else (rows, chunks * columns)
    blocks = None if size is None else find_blocks(bits, (rows, columns), axis, size)
    return Mask(bits, module.make_index(bits, (rows, columns), axis), shape, (rows, columns), axis,
                int(active[0].sum()), blocks)


def whole(active: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(list(active), axis=axis)


def random_chunks(chunks: int, rows: int, columns: int, k: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(rows * columns) < k for _ in range(chunks)]).reshape(chunks, rows, columns)


def with_empty_and_full_rows() -> np.ndarray:
    active = np.zeros((2, 6, 40), bool)
    active[0, 1], active[0, 4, 3:7], active[1, 5], active[1, 0, :4] = True, True, True, True
    return active


MASKS = {
    "one entry": np.ones((1, 1, 1), bool),
    "one of many": random_chunks(3, 5, 7, 1),
    "odd": random_chunks(3, 13, 11, 40),
    "several spans": random_chunks(2, 37, 91, 800),
    "exactly a span": random_chunks(2, 32, SPAN // 32, 256),
    "all active": np.ones((2, 5, 9), bool),
    "empty and full rows": with_empty_and_full_rows(),
    "empty spans": np.concatenate([np.ones((1, 1, 8), bool), np.zeros((1, 1, 3 * SPAN), bool)], axis=2),
}
each_mask = pytest.mark.parametrize("active", MASKS.values(), ids=MASKS)
each_axis = pytest.mark.parametrize("axis", [0, 1])


@each_implementation
@each_axis
@each_mask
def test_expanded_is_the_values_at_the_active_entries(module, axis, active):
    mask = make_mask(active, axis, module)
    values = torch.randn(mask.chunks, mask.active, device=DEVICE)
    chunks = np.zeros(active.shape, np.float32)
    chunks[active] = values.cpu().numpy().ravel()
    assert np.array_equal(module.expand(values, mask).cpu().numpy(), whole(chunks, axis))


@each_implementation
@each_axis
@each_mask
def test_compressed_is_the_active_entries(module, axis, active):
    mask = make_mask(active, axis, module)
    dense = torch.randn(mask.shape, device=DEVICE)
    chunks = np.stack(np.split(dense.cpu().numpy(), len(active), axis))
    assert np.array_equal(module.compress(dense, mask).cpu().numpy().ravel(), chunks[active])


@each_implementation
@each_dtype
@each_axis
def test_dtypes_are_kept(module, dtype, axis):
    active = random_chunks(2, 19, 23, 100)
    mask = make_mask(active, axis, module)
    dense = torch.randn(mask.shape, device=DEVICE).to(dtype)
    values = module.compress(dense, mask)
    there = torch.from_numpy(whole(active, axis)).to(DEVICE)
    assert values.dtype is dtype and values.shape == (mask.chunks, mask.active)
    assert torch.equal(module.expand(values, mask), torch.where(there, dense, torch.zeros((), dtype=dtype)))


@each_implementation
@each_dtype
def test_compress_adds_in_the_precision_of_what_it_adds_to(module, dtype):
    mask = make_mask(random_chunks(2, 19, 23, 100), 1, module)
    dense = torch.randn(mask.shape, device=DEVICE).to(dtype)
    before = torch.randn(mask.chunks, mask.active, device=DEVICE)
    buffer = torch.cat([before.flatten(), torch.full((7,), 5.0, device=DEVICE)])  # with what does not belong to it
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


@each_implementation
@each_axis
@pytest.mark.parametrize("kind", ["transposed", "every second", "one column"])
def test_dense_weights_need_not_be_contiguous(module, axis, kind):
    mask = make_mask(random_chunks(3, 13, 11, 40), axis, module)
    dense = strided(kind, mask.shape)
    assert torch.equal(module.compress(dense, mask), module.compress(dense.contiguous(), mask))


@each_implementation
def test_values_need_not_be_contiguous(module):
    mask = make_mask(random_chunks(3, 13, 11, 40), 0, module)
    values = torch.randn(40, 3, device=DEVICE).T
    assert torch.equal(module.expand(values, mask), module.expand(values.contiguous(), mask))


def test_trial_accepts_the_kernels_and_nothing_that_computes_otherwise(monkeypatch):
    kernels._try_out(triton_compact, torch.device(DEVICE))
    monkeypatch.setattr(triton_compact, "compress", lambda dense, mask, out: out)
    with pytest.raises(RuntimeError, match="something else than PyTorch"):
        kernels._try_out(triton_compact, torch.device(DEVICE))


def test_what_kernels_do_not_take_goes_to_pytorch_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "implementation", lambda device: (triton_compact, triton_compact.NAME))
    kernels._say_once.cache_clear()
    mask = make_mask(random_chunks(2, 5, 7, 11), 1, triton_compact)
    dense = torch.randn(mask.shape, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        values = kernels.compress(dense, mask)
        assert torch.equal(kernels.compress(kernels.expand(values, mask), mask), values)
    assert values.dtype is torch.float64 and len(caplog.records) == 1
    assert "10 x 7" not in caplog.text and "5 x 14 of torch.float64 is not for the kernels" in caplog.text


def test_a_gpu_on_which_triton_fails_is_served_by_pytorch(monkeypatch):
    def fails(module, device):
        raise RuntimeError("no ptxas\nat all")

    monkeypatch.setattr(kernels, "_try_out", fails)
    for chosen in (kernels.implementation, kernels.block_products):
        chosen.cache_clear()
    module, name = kernels.implementation("cuda")
    assert module is torch_reference
    assert name == "torch, since triton does not work here (RuntimeError: no ptxas)"
    assert kernels.block_products("cuda", 64, torch.bfloat16) == (None, "expanded and multiplied as dense weights")
    for chosen in (kernels.implementation, kernels.block_products):
        chosen.cache_clear()


@pytest.mark.parametrize(("size", "dtype", "taken"), [
    (16, torch.bfloat16, True), (128, torch.float32, True), (8, torch.bfloat16, False), (48, torch.float16, False),
    (256, torch.bfloat16, False), (64, torch.float64, False)])
def test_blocks_that_kernels_do_not_take_are_expanded(monkeypatch, size, dtype, taken):
    monkeypatch.setattr(kernels, "implementation", lambda device: (triton_compact, triton_compact.NAME))
    kernels.block_products.cache_clear()
    module, name = kernels.block_products("cuda", size, dtype)
    kernels.block_products.cache_clear()
    assert (module is triton_blocks) == taken == (name == triton_compact.NAME)
    assert taken or f"not {size} of {dtype}" in name


def random_blocks(chunks: int, grid: tuple[int, int], per_row: int, size: int, seed: int = 0) -> np.ndarray:
    """Chunks of balanced blocks: a circulant with its rows and columns shuffled."""
    draw = np.random.default_rng(seed)
    rows, columns = grid
    active = np.zeros((chunks, rows, columns), bool)
    for chunk in active:
        for row in range(rows):
            chunk[row, (row * per_row + np.arange(per_row)) % columns] = True
        chunk[:] = chunk[draw.permutation(rows)][:, draw.permutation(columns)]
    assert (active.sum(1) == rows * per_row // columns).all()
    return active.repeat(size, axis=1).repeat(size, axis=2)


# chunks, grid of a chunk, active blocks of a block row, size, axis, tokens
BLOCKS = {
    "output chunks": (2, (4, 4), 1, 16, 0, 32),
    "input chunks": (2, (4, 2), 1, 16, 1, 32),
    "odd number of tokens": (1, (2, 4), 2, 16, 0, 37),
    "one token": (3, (3, 3), 2, 16, 1, 1),
    "more than a tile of tokens": (1, (2, 2), 1, 32, 0, 150),
    "wide": (2, (2, 6), 3, 16, 1, 20),
    "all active": (2, (2, 3), 3, 16, 1, 16),
    "64": (1, (2, 2), 1, 64, 0, 70),
    "128": (1, (1, 2), 2, 128, 0, 40),
}
each_blocks = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS)


class Product:
    """A weight of blocks with its input and the gradient of its output, and what float64 makes of the same numbers."""

    def __init__(self, case, dtype: torch.dtype):
        chunks, grid, per_row, size, axis, tokens = case
        active = random_blocks(chunks, grid, per_row, size)
        self.mask = make_mask(active, axis, triton_compact, size)
        self.values = torch.randn(self.mask.chunks, self.mask.active, device=DEVICE).to(dtype)
        self.x = torch.randn(tokens, self.mask.shape[1], device=DEVICE).to(dtype)
        self.gradient = torch.randn(tokens, self.mask.shape[0], device=DEVICE).to(dtype)
        self.weight = np.zeros(active.shape)
        self.weight[active] = self.values.double().cpu().numpy().ravel()
        self.weight, self.active, self.axis = whole(self.weight, axis), active, axis

    def compact(self, dense: np.ndarray) -> np.ndarray:
        return np.stack(np.split(dense, len(self.active), self.axis))[self.active]


def close(found: Tensor, wanted: np.ndarray) -> None:
    tolerance = TOLERANCE[found.dtype]
    error = np.abs(found.double().cpu().numpy().reshape(wanted.shape) - wanted)
    assert error.max() <= tolerance * max(1.0, np.abs(wanted).max()), error.max()


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


@pytest.fixture(autouse=True)
def dot_of_bf16(monkeypatch):
    """Triton's interpreter keeps bf16 in uint16, and multiplies these where the GPU multiplies bf16 into fp32."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype != triton.language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot",
                        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))


@each_dtype
@each_blocks
def test_block_products_are_those_in_float64(case, dtype):
    torch.manual_seed(1)
    p = Product(case, dtype)
    close(triton_blocks.forward(p.x, p.values, p.mask), numbers(p.x) @ p.weight.T)
    close(triton_blocks.input_gradient(p.gradient, p.values, p.mask), numbers(p.gradient) @ p.weight)
    close(triton_blocks.weight_gradient(p.gradient, p.x, p.mask), p.compact(numbers(p.gradient).T @ numbers(p.x)))


@each_dtype
def test_weight_gradient_is_added_in_fp32(dtype):
    p = Product(BLOCKS["input chunks"], dtype)
    before = torch.randn(p.values.shape, device=DEVICE)
    out = before.clone()
    assert triton_blocks.weight_gradient(p.gradient, p.x, p.mask, out) is out
    close(out, numbers(before).ravel() + p.compact(numbers(p.gradient).T @ numbers(p.x)))


def test_inputs_of_block_products_need_not_be_contiguous():
    p = Product(BLOCKS["output chunks"], torch.float32)
    x, gradient = p.x.T.contiguous().T, torch.randn(32, 3 * p.mask.shape[0], device=DEVICE)[:, :p.mask.shape[0]]
    assert torch.equal(triton_blocks.forward(x, p.values, p.mask), triton_blocks.forward(p.x, p.values, p.mask))
    close(triton_blocks.input_gradient(gradient, p.values, p.mask), numbers(gradient) @ p.weight)
    close(triton_blocks.weight_gradient(gradient, x, p.mask), p.compact(numbers(gradient).T @ numbers(p.x)))
