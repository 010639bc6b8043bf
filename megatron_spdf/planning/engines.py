"""The seam of engines: what recipe rules, planner and entries ask of one that is not there yet.

A tenant is one file with a row that registers itself. The row says where the class of
`engine/base.py:Engine` is, so that reading a recipe and planning import no engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.planning.memory import RankBytes, zero_bytes
from megatron_spdf.planning.moves import gathered_state
from megatron_spdf.planning.traffic import Traffic
from megatron_spdf.recipe.recipe import ENGINES, Recipe
from megatron_spdf.sparsity.plan import Plan


class EngineRow:
    """A row of the table of engines; a tenant derives from it.

    Attributes:
        title: of the library behind it.
        engine: its class, "module:Class".
        zero_stages: those of `parallel.zero_stage` that it has.
        pipeline: whether it has pipeline stages.
        offload: whether it keeps optimizer state in the host's memory.
        fields: keys of the recipe that it alone reads.
        dry_run: module that builds single ranks of it without other ranks or memory, see
            `engine/dry_run.py`; "": there is none.
    """

    title: str
    engine: str
    zero_stages: tuple[int, ...] = (0,)
    pipeline: bool = False
    offload: bool = False
    fields: tuple[str, ...] = ()
    dry_run: str = ""

    def load(self) -> type:
        """Imports the engine and returns its class."""
        module, _, name = self.engine.partition(":")
        return getattr(importlib.import_module(module), name)

    def rule_violations(self, recipe: Recipe) -> Iterator[str]:
        """Every rule that a recipe of this engine breaks, as one sentence."""
        p, name = recipe.parallel, recipe.engine
        if p.pipeline > 1 and not self.pipeline:
            yield (f"engine={name} has no pipeline stages here, and parallel.pipeline="
                   f"{p.pipeline}; set pipeline=1 or {engines_with(lambda row: row.pipeline)}")
        wanted: list[tuple[str, Any, Callable[[EngineRow], bool]]] = [
            ("parallel.zero_stage", p.zero_stage, lambda row: p.zero_stage in row.zero_stages),
            ("parallel.offload", p.offload, lambda row: row.offload or not p.offload)]
        wanted += [(key, getattr(recipe, key), lambda row, key=key: key in row.fields)
                   for key in _fields() if getattr(recipe, key) is not None]
        for key, value, has in wanted:
            if not has(self):
                yield (f"{key}={str(value).lower() if isinstance(value, bool) else value} needs "
                       f"{engines_with(has)}, and engine={name}; change one of them")

    def rank_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool,
                   data_rank: int) -> RankBytes:
        """Bytes on a rank of a pipeline stage; by ZeRO's closed form where an engine does not say.

        Args:
            data_rank: which of the replicas, where they do not hold equally much.
        """
        return zero_bytes(recipe, plan, stage, recipe.parallel.zero_stage)

    def data_traffic(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> Traffic:
        """Payload bytes of gradients and parameters between the replicas in one optimizer step."""
        raise NotImplementedError

    def move_bytes(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> int:
        """Payload bytes that a rank gathers from the other replicas when masks move."""
        chunks = local_parameters(recipe.model, recipe.parallel, plan, stage)
        return gathered_state(recipe, sum(q.elements for chunk in chunks for q in chunk))


def _fields() -> list[str]:
    return sorted({key for name in ENGINES.names() for key in ENGINES.get(name).fields})


def engines_with(has: Callable[[EngineRow], bool]) -> str:
    """The engines that have something, as settings."""
    return " or ".join(f"engine={name}" for name in ENGINES.names() if has(ENGINES.get(name)))
