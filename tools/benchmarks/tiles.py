"""Every way in which the kernels of a recipe's first layer may be cut up, on this GPU.

What `kernels/tile_shapes.py` takes should be the fastest. It is a table for a person to change: a
run takes by size alone.
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

Trial = tuple[str, str, Callable[[], object]]  # kernel; tile; what is timed


def measure(recipe: Recipe, plan: Plan, device: torch.device, seconds: float) -> list[dict]:
    """A row for each weight of the first layer, kernel and tile.

    Args:
        seconds: that each measurement takes at least.

    Raises:
        ValueError: Triton's kernels do not serve the device.
    """
    moves, name = dispatch.implementation(device.type)
    if not hasattr(moves, "supports"):
        raise ValueError(
            "tiles are those of Triton's kernels, and on this machine's "
            f"{device.type} it is {name} that computes; run it on a machine with a GPU"
        )
    rows = []
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        what = {"weight": weight.name.split(".layers.0.")[-1], "shape": list(weight.shape)}
        for kernel, tile, run in _trials(weight, plan.seed, device, recipe):
            rows.append({**what, "kernel": kernel, "tile": tile, "seconds": _seconds(run, seconds)})
    return rows


def _seconds(run: Callable[[], object], seconds: float) -> float | None:
    """None where the GPU has not the registers or the shared memory that the tile needs."""
    from triton.runtime import OutOfResources

    try:
        return median_seconds(run, seconds)
    except OutOfResources:
        return None


def _trials(weight: SparseWeight, seed: int, device: torch.device,
            recipe: Recipe) -> Iterator[Trial]:
    """What is taken comes first of each kernel."""
    dtype, tokens = dtype_of(recipe), tokens_of(recipe)
    product = choose_product(weight, torch.empty(weight.shape, dtype=dtype, device=device),
                             "per_step")
    if not isinstance(product, TileProduct):
        yield from _moves(replace(weight, pattern=Unstructured(), level=weight.sparsity), seed,
                          device, dtype)
        return
    from megatron_spdf.kernels.tile_shapes import CANDIDATES

    compact = CompactWeight(weight, seed, 0, 1, device, product)
    values = torch.randn(compact.values_shape, device=device).to(dtype)
    x, gradient = (torch.randn(tokens, n, device=device).to(dtype) for n in reversed(compact.shape))
    buffer = torch.zeros(compact.values_shape, device=device)
    operands = {"forward": (x, values, compact.mask),
                "input_gradient": (gradient, values, compact.mask),
                "weight_gradient": (gradient, x, compact.mask, buffer)}
    for kernel, of_kernel in operands.items():
        for tile in CANDIDATES.get((kernel, weight.pattern.tile), []):
            yield (kernel, f"{tile.width} wide, {tile.depth} deep, {tile.warps} warps, "
                           f"{tile.stages} stages",
                   partial(getattr(product.kernels, kernel), *of_kernel, tile=tile))


def _moves(weight: SparseWeight, seed: int, device: torch.device,
           dtype: torch.dtype) -> Iterator[Trial]:
    from megatron_spdf.kernels.tile_shapes import WARPS

    moves, _ = dispatch.implementation(device.type)
    compact = CompactWeight(weight, seed, 0, 1, device)
    values = torch.randn(compact.values_shape, device=device).to(dtype)
    dense = torch.randn(compact.shape, device=device).to(dtype)
    buffer = torch.zeros(compact.values_shape, device=device)
    for warps in WARPS["expand"]:
        yield "expand", f"{warps} warps", partial(moves.expand, values, compact.mask, warps=warps)
    for warps in WARPS["compress"]:
        yield "compress", f"{warps} warps", partial(moves.compress, dense, compact.mask, buffer,
                                                    warps=warps)


def render(rows: list[dict]) -> list[str]:
    """All weights together, by kernel and tile: the first of a kernel is the one that is taken, the
    fastest is bold."""
    together: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        together.setdefault(row["kernel"], {}).setdefault(row["tile"], []).append(row["seconds"])
    lines = [
        "All weights of a layer together; the first of a kernel is taken, the fastest is bold.",
        "",
        "| kernel | tile | time (us) | time of what is taken / time |",
        "|---|---|---|---|",
    ]
    for kernel, tiles in together.items():
        sums = {tile: None if None in each else math.fsum(each) for tile, each in tiles.items()}
        taken, fastest = next(iter(sums.values())), min((s for s in sums.values() if s),
                                                        default=None)
        for tile, time in sums.items():
            figure = "does not fit this GPU" if time is None else f"{time * 1e6:.4g}"
            figure = f"**{figure}**" if time and time == fastest else figure
            against = f"{taken / time:.3f}" if taken and time else "-"
            lines.append(f"| {kernel} | {tile} | {figure} | {against} |")
    return lines
