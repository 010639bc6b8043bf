"""Times every candidate shape of a GPU program for the weights of a recipe's first layer.

The first candidate in `megatron_spdf/kernels/program_shapes.py` should be the fastest. Edit that
table by hand: a run selects by size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.kernel_throughput import median_seconds
from benchmarks.sizes import dtype_of, tokens_of
from megatron_spdf.kernels import dispatch
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.layers.products.base import choose_product
from megatron_spdf.layers.products.tiles import TileProduct
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.tables import Column, Table

Trial = tuple[str, str, Callable[[], object]]  # kernel, shape of a program, function to time


def measure(recipe: Recipe, plan: Plan, device: torch.device, seconds: float) -> list[dict]:
    """Rows for each weight of the first layer, kernel and shape of a program.

    Args:
        seconds: that each measurement takes at least.

    Raises:
        ValueError: Triton's kernels do not serve the device.
    """
    backend, name = dispatch.backend_for(device.type)
    if not hasattr(backend, "supports"):
        raise ValueError(
            "tiles are those of Triton's kernels, and on this machine's "
            f"{device.type} it is {name} that computes; run it on a machine with a GPU"
        )
    rows = []
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        what = {"weight": weight.name.split(".layers.0.")[-1], "shape": list(weight.shape)}
        for kernel, program, run in _trials(weight, plan.seed, device, recipe):
            rows.append({**what, "kernel": kernel, "program": program,
                         "seconds": _seconds(run, seconds)})
    return rows


def _seconds(run: Callable[[], object], seconds: float) -> float | None:
    """Median time; None if the GPU lacks the registers or the shared memory for a program."""
    from triton.runtime import OutOfResources

    try:
        return median_seconds(run, seconds)
    except OutOfResources:
        return None


def _trials(weight: SparseWeight, seed: int, device: torch.device,
            recipe: Recipe) -> Iterator[Trial]:
    """Yields the trials of a weight, the default of each kernel first."""
    dtype = dtype_of(recipe)
    product = choose_product(weight, torch.empty(weight.shape, dtype=dtype, device=device),
                             "per_step")
    if isinstance(product, TileProduct):
        yield from _products(weight, seed, device, dtype, tokens_of(recipe), product)
    yield from _moves(replace(weight, pattern=Unstructured(), level=weight.sparsity), seed, device,
                      dtype)


def _products(weight: SparseWeight, seed: int, device: torch.device, dtype: torch.dtype,
              tokens: int, product: TileProduct) -> Iterator[Trial]:
    from megatron_spdf.kernels.program_shapes import candidates
    from megatron_spdf.kernels.triton_blocks import is_hopper

    compact = CompactWeight(weight, seed, 0, 1, device, product)
    values = torch.randn(compact.values_shape, device=device).to(dtype)
    x, gradient = (torch.randn(tokens, n, device=device).to(dtype) for n in reversed(compact.shape))
    buffer = torch.zeros(compact.values_shape, device=device)
    operands = {"forward": (x, values, compact.mask),
                "input_gradient": (gradient, values, compact.mask),
                "weight_gradient": (gradient, x, compact.mask, buffer)}
    for kernel, of_kernel in operands.items():
        for shape in candidates(kernel, weight.pattern.tile, is_hopper(device)):
            yield (kernel, shape.text,
                   partial(getattr(product.kernels, kernel), *of_kernel, shape=shape))


def _moves(weight: SparseWeight, seed: int, device: torch.device,
           dtype: torch.dtype) -> Iterator[Trial]:
    from megatron_spdf.kernels.program_shapes import WARPS

    backend, _ = dispatch.backend_for(device.type)
    compact = CompactWeight(weight, seed, 0, 1, device)
    values = torch.randn(compact.values_shape, device=device).to(dtype)
    dense = torch.randn(compact.shape, device=device).to(dtype)
    buffer = torch.zeros(compact.values_shape, device=device)
    for warps in WARPS["expand"]:
        yield "expand", f"{warps} warps", partial(backend.expand, values, compact.mask, warps=warps)
    for warps in WARPS["compress"]:
        yield "compress", f"{warps} warps", partial(backend.compress, dense, compact.mask, buffer,
                                                    warps=warps)


def render(rows: list[dict]) -> list[str]:
    """Table of all weights together, by kernel and shape: defaults first, the fastest bold."""
    together: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        together.setdefault(row["kernel"], {}).setdefault(row["program"], []).append(row["seconds"])
    found = []
    for kernel, programs in together.items():
        sums = {program: None if None in each else math.fsum(each)
                for program, each in programs.items()}
        default = next(iter(sums.values()))
        fastest = min((s for s in sums.values() if s), default=None)
        found += [{"kernel": kernel, "program": program, "time": _figure(time, fastest),
                   "ratio": default / time if default and time else None}
                  for program, time in sums.items()]
    columns = [Column("kernel"), Column("program"), Column("time (us)", "time", align="right"),
               Column("time of the default / time", "ratio", ".3f")]
    return ["All weights of a layer together. The first of a kernel is the default, the fastest "
            "bold.", "", Table(columns, found).markdown()]


def _figure(seconds: float | None, fastest: float | None) -> str:
    if seconds is None:
        return "does not fit this GPU"
    return f"**{seconds * 1e6:.4g}**" if seconds == fastest else f"{seconds * 1e6:.4g}"
