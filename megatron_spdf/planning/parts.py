"""What each stage of a run holds, and each part of one that an algorithm prunes: the fullest of
them has to fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_spdf.planning.memory import RankBytes, rank_bytes
from megatron_spdf.planning.moves import transient_bytes
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import GIB, Column, Table


@dataclass(frozen=True)
class StageBytes:
    """Bytes of a stage of a run, or of a part of one, on a GPU of its fullest pipeline stage.

    Attributes:
        first, last: its steps are first + 1 ... last of the run.
        sparsity: that weights are stored at.
        held: between steps.
        transient: held beside, in a step before masks move.
    """

    number: int
    first: int
    last: int
    sparsity: float
    held: RankBytes
    transient: int

    @property
    def total(self) -> int:
        return self.held.total + self.transient


def bytes_of_stages(recipe: Recipe) -> list[StageBytes]:
    """Bytes of every stage of a run, and every part of one, in order."""
    found = []
    for stage in stages_of(recipe):
        own, plan = stage.as_single_run, stage.plan
        each = [StageBytes(stage.number, stage.first, stage.last, plan.sparsity,
                           rank_bytes(own, plan, place, on_gpu=True),
                           transient_bytes(own, plan, place))
                for place in range(own.parallel.pipeline)]
        found.append(max(each, key=lambda part: part.total))
    return found


def stored_plans(recipe: Recipe, plan: Plan) -> list[Plan]:
    """The plans that decide whether a layout fits: the one given, and where an algorithm prunes
    from dense weights, those that store most.

    Of plans that an algorithm goes through, a sparser one holds less of everything, but beside
    dense weights lie neither masks nor expanded copies: the densest two are looked at.
    """
    if recipe.stages:
        return [plan]
    stored = {stage.plan.active: stage.plan for stage in stages_of(recipe)}
    densest = sorted(stored.items(), key=lambda item: (bool(item[1].weights), -item[0]))
    return [plan, *(other for _, other in densest[:2])] if len(stored) > 1 else [plan]


def as_plain(stages: list[StageBytes]) -> list[dict[str, Any]]:
    """As plain values, for the overview."""
    found = [asdict(stage) | {"total": stage.total} for stage in stages]
    for stage in found:
        if not stage["held"]["teacher"]:
            stage["held"].pop("teacher")
    return found


def render_stage_bytes(stages: list[dict[str, Any]]) -> str:
    """Bytes of each stage as text."""
    parts = ("parameters", "gradients", "master", "moments", "expanded", "masks",
             *(["teacher"] if "teacher" in stages[0]["held"] else []))
    columns = [Column("GiB per GPU", lambda s: f"stage {s['number']}"),
               Column("steps", lambda s: f"{s['first'] + 1:,} - {s['last']:,}", align="right"),
               Column("sparsity", form=".2%"),
               *(Column(part, lambda s, part=part: s["held"][part] / GIB.size, ".3f")
                 for part in parts),
               Column("for a move", lambda s: s["transient"] / GIB.size, ".3f"),
               Column("total", lambda s: s["total"] / GIB.size, ".3f")]
    return Table(columns, stages).text("  ") + "  (without activations)"
