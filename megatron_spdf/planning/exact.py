"""The closed forms of memory held against the engine's own buffers, rank by rank, at any scale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spdf.planning.buffers import lay_out
from megatron_spdf.planning.engines import engines_with
from megatron_spdf.planning.memory import rank_bytes, render_parallel
from megatron_spdf.recipe.recipe import ENGINES, Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import GIB, Column, Table
from megatron_spdf.text import counted

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("parameters", "gradients", "optimizer", "expanded", "masks")


@dataclass(frozen=True)
class Count:
    """One rank, counted and predicted.

    Attributes:
        place: tensor, pipeline and data rank.
        counted, predicted: bytes by part, see PARTS.
        buckets, predicted_buckets: elements of the gradient buckets, chunk by chunk.
    """

    rank: int
    place: tuple[int, int, int]
    counted: dict[str, int]
    predicted: dict[str, int]
    buckets: list[list[int]]
    predicted_buckets: list[list[int]]

    @property
    def agrees(self) -> bool:
        return self.counted == self.predicted and self.buckets == self.predicted_buckets


def ranks_of_interest(recipe: Recipe) -> list[int]:
    """One rank of each kind of stage: the first, one in the middle, the last of the pipeline; and
    the last of all, whose share of the optimizer's state has the padding."""
    p = recipe.parallel
    stages = sorted({0, p.pipeline // 2, p.pipeline - 1})
    return sorted({stage * p.tensor * p.data for stage in stages} | {p.world - 1})


def dry_run(recipe: Recipe, plan: Plan, ranks: list[int]) -> list[Count]:
    """Builds ranks of the recipe's layout on the meta device, in a process of its own, and counts.

    Raises:
        ValueError: a rank that the layout does not have, or an engine whose buffers cannot be
            built.
    """
    return dry_runs([(recipe, plan, ranks)])[0]


def dry_runs(wanted: Sequence[tuple[Recipe, Plan, list[int]]]) -> list[list[Count]]:
    """`dry_run` of several layouts in one process, which spares starting the engine for each."""
    for recipe, _, ranks in wanted:
        if not ENGINES.get(recipe.engine).dry_run:
            raise ValueError(f"engine={recipe.engine} makes its buffers while it trains and cannot "
                             "be counted before; leave --exact out for the closed forms, or set "
                             f"{engines_with(lambda row: row.dry_run)}")
        world = recipe.parallel.world
        for rank in ranks:
            if not 0 <= rank < world:
                raise ValueError(f"rank {rank} is not in this layout of {counted(world, 'rank')}; "
                                 f"take one of 0 to {world - 1}")
    requests = json.dumps([{"recipe": _plain(recipe), "ranks": ranks} for recipe, _,
                           ranks in wanted])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None,
                                                                     [os.environ.get("PYTHONPATH")])])}
    (module,) = {ENGINES.get(recipe.engine).dry_run for recipe, _, _ in wanted}
    done = subprocess.run([sys.executable, "-m", module],
                          input=requests, text=True, capture_output=True, env=environment,
                          check=False)
    if done.returncode:
        raise RuntimeError(f"the dry run ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [[_held_against_closed_form(recipe, plan, rank, f) for rank,
             f in zip(ranks, found, strict=True)]
            for (recipe, plan, ranks),
            found in zip(wanted, json.loads(done.stdout.splitlines()[-1]), strict=True)]


def _plain(recipe: Recipe) -> dict:
    """As plain values. Attention holds no parameters, and Transformer Engine wants a GPU."""
    plain = recipe.model_dump()
    plain["kernels"]["attention"] = "sdpa"
    return plain


def _held_against_closed_form(recipe: Recipe, plan: Plan, rank: int, found: dict) -> Count:
    tensor, stage, data = found["place"]
    predicted = rank_bytes(recipe, plan, stage, on_gpu=True, data_rank=data)
    buckets = [[end - start for start, end in buffer.buckets]
               for buffer in lay_out(recipe.model, recipe.parallel, plan, stage, on_gpu=True)]
    return Count(rank, (tensor, stage, data), {k: found[k] for k in PARTS},
                 {k: getattr(predicted, k) for k in PARTS}, found["buckets"], buckets)


def render_counts(recipe: Recipe, counts: list[Count]) -> str:
    """A row a rank: GiB as counted, and whether the closed form gives the same bytes."""
    parts = [Column(part, lambda c, part=part: c.counted[part] / GIB.size, ".4f")
             for part in PARTS]
    columns = [Column("rank", form="d"),
               Column("TP,PP,DP rank", lambda c: ",".join(map(str, c.place))), *parts,
               Column("total", lambda c: sum(c.counted.values()) / GIB.size, ".4f"),
               Column("buckets", lambda c: sum(map(len, c.buckets)), "d"),
               Column("closed form", _difference)]
    return (f"built on the meta device, {render_parallel(recipe)}\n"
            f"{Table(columns, counts).text('  ')}\n"
            "  GiB; expanded: dense copies kept for the step; masks with what kernels derive from "
            "them")


def _difference(count: Count) -> str:
    off = [f"{k}: {count.predicted[k]:,} instead of {count.counted[k]:,} bytes"
           for k in PARTS if count.predicted[k] != count.counted[k]]
    off += ["other buckets"] * (count.buckets != count.predicted_buckets)
    return "; ".join(off) or "equal to the byte"
