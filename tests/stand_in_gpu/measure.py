#!/usr/bin/env python3
"""What a step of a recipe asks of a GPU: memory by PyTorch's allocator beside the planner's,
launches, waits.

    python tests/stand_in_gpu/run.py tests/stand_in_gpu/measure.py RECIPE [section.key=value ...]
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time

import torch
from benchmarks.engines import QuickWeights, _masks_of_first_layer, joined, take_steps

from megatron_spdf.engine.factory import make_engine
from megatron_spdf.planning.activations import peak_bytes
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.sparsity.plan import Plan

GIB, WARM_UP, STEPS = 2**30, 2, 6


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    plan, stand_in = Plan.of(recipe), ctypes.CDLL(None)
    with joined(recipe) as device, _masks_of_first_layer():
        engine = make_engine(recipe, plan, device, QuickWeights(device))
        take_steps(recipe, engine, range(1, 1 + WARM_UP))
        state = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds, counts = [], (ctypes.c_long * 4)()
        for number in range(1 + WARM_UP, 1 + WARM_UP + STEPS):
            stand_in.stand_in_reset()
            started = time.perf_counter()
            take_steps(recipe, engine, range(number, number + 1))
            seconds.append(time.perf_counter() - started)
            stand_in.stand_in_counts(counts)
        figures = {"planned (GiB)": peak_bytes(recipe, plan, 0) / GIB,
                   "allocated, most (GiB)": torch.cuda.max_memory_allocated() / GIB,
                   "reserved, most (GiB)": torch.cuda.max_memory_reserved() / GIB,
                   "allocated between steps (GiB)": state / GIB,
                   "micro-batches": recipe.micro_batches,
                   "host's time of a step (s)": statistics.median(seconds),
                   **dict(zip(("launches", "waits", "copies to the host", "copies to the GPU"),
                              counts, strict=True))}
    print(json.dumps({k: round(v, 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
