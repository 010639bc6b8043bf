"""Speed of the kernels on this machine: expand and compress against the time in which the bytes
that they must move are copied, products of tiles and of 2:4 weights against dense ones, weight by
weight of a recipe's first layer.

On a GPU these are Triton's kernels, beside PyTorch's where both do the same. Without one, PyTorch's
on the CPU, so that the command can be tried; figures of a CPU say nothing about a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.utils.benchmark import Timer

from megatron_spdf.kernels import dispatch, torch_reference
from megatron_spdf.layers.compact import CompactWeight
from megatron_spdf.layers.products.base import choose_product, product_of
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.patterns.unstructured import Unstructured
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.tables import MICROSECONDS, Column, Table

LAYERS = 24  # whose weights are expanded and compressed in turn: more bytes than a cache has
REPLAYS = 2, 7  # of a graph, to warm up and timed


@dataclass(frozen=True)
class Figure:
    """One kernel on one weight.

    Attributes:
        seconds: median.
        floor: seconds below which it cannot be: of a copy of as many bytes, or the active share of
            the dense product.
        dense: seconds of the dense product that it stands for; None for expand and compress.
        torch: seconds of PyTorch's implementation on the same device, where it is another; alone,
            with a cold cache.
    """

    kernel: str
    weight: str
    shape: tuple[int, int]
    sparsity: float
    seconds: float
    floor: float
    dense: float | None = None
    torch: float | None = None


def measure(recipe: Recipe, plan: Plan, seconds: float = 0.2) -> dict:
    """Figures of the kernels that the recipe's first layer uses on this machine.

    Args:
        seconds: that each measurement takes at least.

    Returns:
        Plain values: tokens, dtype, bytes a second of a copy, names of the implementations, and the
        figures.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    tokens = recipe.train.micro_batch * recipe.train.sequence_length
    bandwidth = copy_bandwidth(device, seconds)
    figures: list[Figure] = []
    for weight in (w for n, w in plan.weights.items() if ".layers.0." in n):
        place = plan.seed, recipe.parallel.tensor, device, dtype
        figures += moves(weight, *place, bandwidth, seconds)
        if product_of(weight.pattern):
            figures += products(weight, *place, tokens, seconds)
    patterns = {w.pattern for w in plan.weights.values()}
    own = {(kind := product_of(p)).title: kind.describe(p, device.type, dtype)
           for p in patterns if product_of(p)}
    return {"device_type": device.type, "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "copy_bytes_per_second": bandwidth,
            "expand_compress": dispatch.backend_name(device.type),
            "products": own,
            "figures": [vars(f) for f in figures]}


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = 2**28 if device.type == "cuda" else 2**25
    source, target = torch.ones((2, size), dtype=torch.uint8, device=device)
    return 2 * size / median_seconds(lambda: target.copy_(source), seconds)


def moves(weight: SparseWeight, seed: int, tensor: int, device: torch.device, dtype: torch.dtype,
          bandwidth: float, seconds: float) -> list[Figure]:
    """Expand, and compress added to an fp32 buffer; of the unstructured mask, whatever the recipe's
    pattern. As in a step, the same weight of one layer after another."""
    # A weight of tiles may have fewer slices; they stay, and so does the level that is reached.
    weight = replace(weight, pattern=Unstructured(), level=weight.sparsity)
    compact = CompactWeight(weight, seed, 0, tensor, device)
    mask, width = compact.mask, dtype.itemsize
    masks = [replace(mask, bits=mask.bits.clone(), index=mask.index.clone())
             for _ in range(LAYERS)]
    values = [torch.randn(compact.values_shape, device=device).to(dtype) for _ in masks]
    dense = [torch.randn(compact.shape, device=device).to(dtype) for _ in masks]
    buffers = [torch.zeros(compact.values_shape, device=device) for _ in masks]
    peer = None
    if dispatch.backend_for(device.type)[0] is not torch_reference:
        peer = replace(mask,
                       index=torch_reference.make_index(mask.bits, mask.slice_shape, mask.axis))
    whole, active = dense[0].numel(), values[0].numel()
    bits = whole / 8
    runs = {
        "expand": (lambda i: dispatch.expand(values[i], masks[i]),
                   lambda i: torch_reference.expand(values[i], peer),
                   width * (whole + active) + bits),
        "compress": (lambda i: dispatch.compress(dense[i], masks[i], buffers[i]),
                     lambda i: torch_reference.compress(dense[i], peer, buffers[i]),
                     width * whole + 8 * active + bits),
    }
    place = weight.name, compact.shape, weight.sparsity
    return [Figure(name, *place, median_in_turn(run, LAYERS, seconds), moved / bandwidth,
                   torch=peer and median_seconds(lambda other=other: other(0), seconds))
            for name, (run, other, moved) in runs.items()]


def products(weight: SparseWeight, seed: int, tensor: int, device: torch.device,
             dtype: torch.dtype, tokens: int, seconds: float) -> list[Figure]:
    """y = x W^T and both gradients with a weight of a pattern that has a product, against the same
    with a dense one."""
    dense = torch.randn(CompactWeight(weight, seed, 0, tensor, "meta").shape,
                        device=device).to(dtype)
    product = choose_product(weight, dense, "per_layer")
    compact = CompactWeight(weight, seed, 0, tensor, device, product)
    mask, values = compact.mask, compact.right_inverse(dense)
    x, gradient = (torch.randn(tokens, n, device=device).to(dtype) for n in reversed(compact.shape))
    buffer = torch.zeros(compact.values_shape, device=device)
    runs = {
        "forward": (lambda: product.forward(x, values, mask), lambda: x @ dense.T),
        "input gradient": (lambda: product.input_gradient(gradient, values, mask),
                           lambda: gradient @ dense),
        "weight gradient": (lambda: product.weight_gradient(gradient, x, mask, buffer),
                            lambda: gradient.T @ x),
    }
    pattern, found = product_of(weight.pattern).title, []
    for name, (run, plain) in runs.items():
        full = median_seconds(plain, seconds)
        # whose product has no operand with zeros
        whole = not weight.pattern.skips_zeros and name == "weight gradient"
        floor = full if whole else (1.0 - weight.sparsity) * full
        found.append(Figure(f"{pattern}, {name}", weight.name, compact.shape, weight.sparsity,
                            median_seconds(run, seconds), floor, dense=full))
    return found


def median_seconds(run, seconds: float) -> float:
    """Median of one call.

    On a GPU it is of the device's time between the events before and after a call, with a cold L2
    cache: that is emptied before each call, and meanwhile the host launches the call. So the launch
    of a short kernel does not count, and the gaps between kernels count where the host is late.
    On the CPU it is of the time that passes.

    Args:
        seconds: that it is called for at least.
    """
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, warmup=250 * seconds, rep=1000 * seconds, return_mode="median") / 1e3
    run()
    return Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=seconds).median


def median_in_turn(run: Callable[[int], object], count: int, seconds: float) -> float:
    """Median of one call among `count` different ones that follow one another.

    On a GPU they are one CUDA graph, so that a short kernel is not longer by its launch, nor by the
    beginning and the end of the only one that runs. Between a call and the same one again the
    others fill the cache.

    Args:
        run: takes the number of the call, from 0, each of which has tensors of its own.
        count: number of calls.
        seconds: that they are called for at least, on the CPU.
    """
    if not torch.cuda.is_available():
        return median_seconds(lambda: [run(i) for i in range(count)], seconds) / count
    for i in range(count):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            run(i)
    warm_up, timed = REPLAYS
    spent = [_replayed(graph) for _ in range(warm_up + timed)]
    return median(spent[warm_up:]) / count


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of the device for a graph."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


_COLUMNS = [
    Column("kernel"),
    Column("weight", lambda f: f["weight"].split(".layers.0.")[-1].removesuffix(".weight")),
    Column("shape", lambda f: " x ".join(map(str, f["shape"]))), Column("sparsity", form=".2%"),
    Column("time", "seconds", ".4g", MICROSECONDS), Column("floor", form=".4g", unit=MICROSECONDS)]


def render(measured: dict) -> list[str]:
    """The figures as a Markdown table."""
    lines, own = [], "; ".join(f"{what} {by}" for what, by in measured["products"].items())
    if measured["device_type"] == "cpu":
        lines += ["no GPU here: PyTorch on the CPU, which says nothing about a GPU and shows that "
                  "the command runs", ""]
    lines += [f"{measured['tokens']} tokens, {measured['dtype']}; a copy moves "
              f"{measured['copy_bytes_per_second'] / 1e9:.4g} GB/s; expand/compress "
              f"{measured['expand_compress']}; {own or 'no products'}", "",
              Table([*_COLUMNS, *(Column(f"{other} / time", lambda f, other=other: f[other]
                                         and f[other] / f["seconds"], ".3g")
                                  for other in ("floor", "dense", "torch"))],
                    measured["figures"]).markdown()]
    return [*lines, *_render_sums(measured["figures"])]


def _render_sums(figures: list[dict]) -> list[str]:
    """Dense over sparse, all products of the layer together."""
    products = [f for f in figures if f["dense"]]
    if not products:
        return []
    ratio = math.fsum(f["dense"] for f in products) / math.fsum(f["seconds"] for f in products)
    pattern = products[0]["kernel"].split(",")[0]
    return ["", f"linear layers, forward and backward, dense over {pattern}: {ratio:.3f}"]
