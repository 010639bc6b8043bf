"""Triton's kernels: products with tiles against float64, and what is done where they cannot
serve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_masks import DEVICE, NO_TRITON, TOLERANCE, make_mask, random_slices, whole
from torch import Tensor

from megatron_spdf.kernels import dispatch, tiles, torch_reference

triton = pytest.importorskip("triton", reason=NO_TRITON)
from megatron_spdf.kernels import triton_compact, triton_tiles  # noqa: E402
from megatron_spdf.kernels.program_shapes import (  # noqa: E402
    CANDIDATES,
    FEW,
    HOPPER,
    WARPS,
    ProgramShape,
    select_shape,
    select_weight_shape,
)

pytestmark = pytest.mark.slow  # in Triton's interpreter
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def test_trial_accepts_the_kernels_and_nothing_that_computes_otherwise(monkeypatch):
    dispatch._self_test(triton_compact, torch.device(DEVICE))
    monkeypatch.setattr(triton_compact, "compress", lambda dense, mask, out: out)
    with pytest.raises(RuntimeError, match="something else than PyTorch"):
        dispatch._self_test(triton_compact, torch.device(DEVICE))


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_trial_accepts_products_and_nothing_that_computes_otherwise(monkeypatch, product):
    arguments = triton_tiles, triton_compact, torch.device(DEVICE), 16, torch.bfloat16
    tiles._self_test(*arguments)
    right = getattr(triton_tiles, product)
    monkeypatch.setattr(triton_tiles, product, lambda *operands: right(*operands) + 1)
    with pytest.raises(RuntimeError, match="something else than those with the expanded weight"):
        tiles._self_test(*arguments)
    monkeypatch.setattr(dispatch, "backend_for",
                        lambda device: (triton_compact, triton_compact.NAME))
    tiles.tile_products.cache_clear()
    module, name = tiles.tile_products(DEVICE, 16, torch.bfloat16)
    tiles.tile_products.cache_clear()
    assert module is None
    assert name.startswith("expanded and multiplied as dense weights, since triton's products do "
                           "not work here (Run")


def test_what_kernels_do_not_take_goes_to_pytorch_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "backend_for",
                        lambda device: (triton_compact, triton_compact.NAME))
    dispatch.warn_once.cache_clear()
    mask = make_mask(random_slices(2, 5, 7, 11), 1, triton_compact)
    dense = torch.randn(mask.shape, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        values = dispatch.compress(dense, mask)
        assert torch.equal(dispatch.compress(dispatch.expand(values, mask), mask), values)
    assert values.dtype is torch.float64 and len(caplog.records) == 1
    assert (
        "10 x 7" not in caplog.text
        and "5 x 14 of torch.float64 is not for the kernels" in caplog.text
    )


def test_a_gpu_on_which_triton_fails_is_served_by_pytorch(monkeypatch):
    def fails(module, device):
        raise RuntimeError("no ptxas\nat all")

    monkeypatch.setattr(dispatch, "_self_test", fails)
    for chosen in (dispatch.backend_for, tiles.tile_products):
        chosen.cache_clear()
    module, name = dispatch.backend_for("cuda")
    assert module is torch_reference
    assert name == "torch, since triton does not work here (RuntimeError: no ptxas)"
    assert tiles.tile_products("cuda", 64, torch.bfloat16) == (None,
                                                                  "expanded and multiplied as "
                                                                  "dense weights")
    for chosen in (dispatch.backend_for, tiles.tile_products):
        chosen.cache_clear()


@pytest.mark.parametrize(("size", "dtype", "taken"), [
    (16, torch.bfloat16, True), (128, torch.float32, True), (8, torch.bfloat16, False),
    (48, torch.float16, False), (256, torch.bfloat16, False), (64, torch.float64, False)])
def test_tiles_that_kernels_do_not_take_are_expanded(monkeypatch, size, dtype, taken):
    monkeypatch.setattr(dispatch, "backend_for",
                        lambda device: (triton_compact, triton_compact.NAME))
    tiles.tile_products.cache_clear()
    module, name = tiles.tile_products(DEVICE, size, dtype)
    tiles.tile_products.cache_clear()
    assert (module is triton_tiles) == taken == (name == triton_compact.NAME)
    assert taken or f"not {size} of {dtype}" in name


def random_tiles(slices: int, grid: tuple[int, int], per_row: int, size: int,
                 seed: int = 0) -> np.ndarray:
    """Slices of balanced tiles: a circulant with its rows and columns shuffled."""
    draw = np.random.default_rng(seed)
    rows, columns = grid
    active = np.zeros((slices, rows, columns), bool)
    for part in active:
        for row in range(rows):
            part[row, (row * per_row + np.arange(per_row)) % columns] = True
        part[:] = part[draw.permutation(rows)][:, draw.permutation(columns)]
    assert (active.sum(1) == rows * per_row // columns).all()
    return active.repeat(size, axis=1).repeat(size, axis=2)


# slices, grid of a slice, active tiles of a tile row, size, axis, tokens
TILES = {
    "output slices": (2, (4, 4), 1, 16, 0, 32),
    "input slices": (2, (4, 2), 1, 16, 1, 32),
    "odd number of tokens": (1, (2, 4), 2, 16, 0, 37),
    "one token": (3, (3, 3), 2, 16, 1, 1),
    "more than a tile of tokens": (1, (2, 2), 1, 32, 0, 150),
    "wide": (2, (2, 6), 3, 16, 1, 20),
    "all active": (2, (2, 3), 3, 16, 1, 16),
    "64": (1, (2, 2), 1, 64, 0, 70),
    "128": (1, (1, 2), 2, 128, 0, 40),
}
each_tiles = pytest.mark.parametrize("case", TILES.values(), ids=TILES)


class Product:
    """A weight of tiles with its input and the gradient of its output, and what float64 makes of
    the same numbers."""

    def __init__(self, case, dtype: torch.dtype):
        slices, grid, per_row, size, axis, tokens = case
        active = random_tiles(slices, grid, per_row, size)
        self.mask = make_mask(active, axis, triton_compact, size)
        self.values = torch.randn(self.mask.slices, self.mask.active, device=DEVICE).to(dtype)
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
    """Triton's interpreter keeps bf16 in uint16, and multiplies these where the GPU multiplies bf16
    into fp32."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype != triton.language.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32),
                            triton.language.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot",
                        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))


@each_dtype
@each_tiles
def test_tile_products_are_those_in_float64(case, dtype):
    torch.manual_seed(1)
    p = Product(case, dtype)
    bias = torch.randn(p.mask.shape[0], device=DEVICE).to(dtype)
    for added in (None, bias):
        close(triton_tiles.forward(p.x, p.values, p.mask, bias=added),
              numbers(p.x) @ p.weight.T + (0.0 if added is None else numbers(bias)))
    close(triton_tiles.input_gradient(p.gradient, p.values, p.mask), numbers(p.gradient) @ p.weight)
    close(triton_tiles.weight_gradient(p.gradient, p.x, p.mask),
          p.compact(numbers(p.gradient).T @ numbers(p.x)))


@each_dtype
def test_weight_gradient_is_added_in_fp32(dtype):
    p = Product(TILES["input slices"], dtype)
    before = torch.randn(p.values.shape, device=DEVICE)
    out = before.clone()
    assert triton_tiles.weight_gradient(p.gradient, p.x, p.mask, out) is out
    close(out, numbers(before).ravel() + p.compact(numbers(p.gradient).T @ numbers(p.x)))


def test_inputs_of_tile_products_need_not_be_contiguous():
    p = Product(TILES["output slices"], torch.float32)
    x, gradient = p.x.T.contiguous().T, torch.randn(32, 3 * p.mask.shape[0],
                                                    device=DEVICE)[:, :p.mask.shape[0]]
    assert torch.equal(triton_tiles.forward(x, p.values, p.mask),
                       triton_tiles.forward(p.x, p.values, p.mask))
    close(triton_tiles.input_gradient(gradient, p.values, p.mask), numbers(gradient) @ p.weight)
    close(triton_tiles.weight_gradient(gradient, x, p.mask),
          p.compact(numbers(gradient).T @ numbers(p.x)))


@pytest.mark.parametrize(("kernel", "size", "shape"),
                         [(*key, s) for some in (CANDIDATES, HOPPER)
                          for key, shapes in some.items() for s in shapes])
def test_products_are_the_same_with_every_program_shape(monkeypatch, kernel, size, shape):
    for choice in ("select_shape", "select_weight_shape"):
        monkeypatch.setattr(triton_tiles, choice, lambda *_: pytest.fail("another shape was taken"))
    p = Product((1, (2, 2), 1, size, 0, 70), torch.float16)
    operands = {"forward": (p.x, p.values), "input_gradient": (p.gradient, p.values),
                "weight_gradient": (p.gradient, p.x)}[kernel]
    wanted = {"forward": lambda: numbers(p.x) @ p.weight.T,
              "input_gradient": lambda: numbers(p.gradient) @ p.weight,
              "weight_gradient": lambda: p.compact(numbers(p.gradient).T @ numbers(p.x))}[kernel]()
    close(getattr(triton_tiles, kernel)(*operands, p.mask, shape=shape), wanted)


@pytest.mark.parametrize("case", [(1, (2, 6), 6, 16, 0, 20), (2, (4, 4), 2, 16, 1, 37)], ids=str)
def test_tiles_that_are_computed_together_have_the_same_gradients(case):
    p, one = Product(case, torch.bfloat16), ProgramShape(16, 16, 4, 3)
    wanted = triton_tiles.weight_gradient(p.gradient, p.x, p.mask, shape=one)
    for group in (2, 4):
        found = triton_tiles.weight_gradient(p.gradient, p.x, p.mask,
                                             shape=one._replace(group=group))
        assert torch.equal(found, wanted)


STAYS = ProgramShape(32, 16, 4, 3, stays=True)


@each_tiles
def test_programs_that_stay_compute_what_float64_does(case):
    p = Product(case, torch.float16)
    bias = torch.randn(p.mask.shape[0], device=DEVICE).half()
    for added in (None, bias):
        close(triton_tiles.forward(p.x, p.values, p.mask, STAYS, added),
              numbers(p.x) @ p.weight.T + (0.0 if added is None else numbers(bias)))
    close(triton_tiles.input_gradient(p.gradient, p.values, p.mask, STAYS),
          numbers(p.gradient) @ p.weight)


def test_programs_that_stay_take_rows_that_begin_anywhere():
    p = Product(TILES["input slices"], torch.float16)
    wide = torch.zeros(len(p.x), p.x.shape[1] + 1, dtype=torch.float16, device=DEVICE)
    odd, same = wide[:, 1:].copy_(p.x), p.x[:1].expand_as(p.x)
    for x in (odd, same, p.x.T.contiguous().T):
        assert torch.equal(triton_tiles.forward(x, p.values, p.mask, STAYS),
                           triton_tiles.forward(x.contiguous(), p.values, p.mask, STAYS))


def test_shapes_are_those_of_the_gpu_the_dtype_and_the_tokens():
    for kernel in ("forward", "input_gradient"):
        assert select_shape(kernel, 64, 4096, 2, hopper=True).stays
        for other in ((64, 4096, 2), (32, 4096, 2, True), (64, 4096, 4, True), (64, 8, 2, True)):
            assert not select_shape(kernel, *other).stays
        assert select_shape(kernel, 64, 8, 2, True).width == 16


@pytest.mark.parametrize(("rows", "slots", "programs"), [
    (128, 8, 128), (32, 32, 128), (96, 8, 96), (32, 8, 128), (4, 4, 16), (4, 6, 24)])
def test_weight_gradients_have_programs_for_half_of_an_h100(rows, slots, programs):
    shape = select_weight_shape(64, rows, slots, 2, hopper=True)
    assert rows * slots // math.gcd(slots, shape.group) * (64 // shape.width) == programs
    assert programs >= FEW or shape.group == 1
    assert select_weight_shape(64, rows, slots, 4, hopper=True).depth == 32


@pytest.mark.parametrize("warps", sorted({n for some in WARPS.values() for n in some}))
def test_moves_are_the_same_with_any_number_of_warps(warps):
    mask = make_mask(random_slices(2, 40, 64, 700), 1, triton_compact)
    values, buffer = torch.randn(2, 700, device=DEVICE), torch.ones(2, 700, device=DEVICE)
    dense = triton_compact.expand(values, mask, warps=warps)
    assert torch.equal(dense, triton_compact.expand(values, mask))
    assert torch.equal(triton_compact.compress(dense, mask, buffer, warps=warps), 1 + values)
