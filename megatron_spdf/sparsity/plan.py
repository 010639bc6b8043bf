"""The plan: which weight is how sparse, decided once from the recipe and the same on every rank."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from functools import cached_property

from megatron_spdf.architecture.weights import Weight
from megatron_spdf.kernels.limits import multiplied
from megatron_spdf.sparsity.patterns.tiles import balanced_parts, block_chunks
from megatron_spdf.sparsity.patterns.two_four import check_two_four
from megatron_spdf.sparsity.settings import Sparsity


@dataclass(frozen=True)
class SparseWeight:
    """A weight cut along its tensor-parallel axis into equal chunks with the same number of active entries.

    Attributes:
        name: canonical name; with the seed and the chunk number it determines the mask.
        shape: (out, in) of the whole weight.
        axis: the axis that tensor parallelism, and so the chunks, cut.
        chunks: number of chunks C; every tensor-parallel degree that divides C keeps the chunks whole.
        level: the sparsity asked for.
        block: size of the blocks that are active or zero as a whole, balanced in each chunk; None: entries are.
        two_four: of every four entries of a row, and of a column, two are active.
    """

    name: str
    shape: tuple[int, int]
    axis: int
    chunks: int
    level: float
    block: int | None = None
    two_four: bool = False

    @property
    def chunk_shape(self) -> tuple[int, int]:
        out, inputs = self.shape
        return (out // self.chunks, inputs) if self.axis == 0 else (out, inputs // self.chunks)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def active_per_chunk(self) -> int:
        """Exact number of active entries k of each chunk."""
        entries = math.prod(self.chunk_shape)
        if self.block is None:
            return max(1, round((1.0 - self.level) * entries))
        active, parts = balanced_parts(self.grid, self.level)
        return entries // parts * active

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of a chunk, (block rows, block columns)."""
        assert self.block is not None, self.name
        rows, columns = self.chunk_shape
        return rows // self.block, columns // self.block

    @property
    def per_row(self) -> int:
        """Active blocks of a block row of a chunk."""
        active, parts = balanced_parts(self.grid, self.level)
        return self.grid[1] // parts * active

    @property
    def active(self) -> int:
        return self.chunks * self.active_per_chunk

    @property
    def sparsity(self) -> float:
        """The sparsity that whole numbers, or balanced blocks, allow, which the measured one must equal."""
        return 1.0 - self.active / self.numel


@dataclass(frozen=True, eq=False)  # a key by identity: the planner asks about one plan at thousands of layouts
class Plan:
    """Canonical name -> sparse weight, for the weights that are sparse; `seed` is of the masks, `expand` the recipe's
    `sparsity.expand`."""

    seed: int
    weights: dict[str, SparseWeight]
    expand: str = "step"

    @cached_property
    def on_blocks(self) -> Plan:
        """The weights whose zeros a GPU skips; what it executes counts their active entries only."""
        return Plan(self.seed, {n: w for n, w in self.weights.items() if self.multiplies_blocks(n)}, self.expand)

    def multiplies_blocks(self, name: str) -> bool:
        """Whether a GPU multiplies with this weight's active blocks alone."""
        block = self.weights[name].block
        return block is not None and multiplied(block)

    def keeps_copy(self, name: str, on_gpu: bool) -> bool:
        """Whether a dense copy of this weight is kept for the step."""
        return self.expand == "step" and not (on_gpu and self.multiplies_blocks(name))

    @property
    def numel(self) -> int:
        return sum(w.numel for w in self.weights.values())

    @property
    def active(self) -> int:
        return sum(w.active for w in self.weights.values())

    @property
    def sparsity(self) -> float:
        """Of the sparse weights together; 0.0 where there is none."""
        return 1.0 - self.active / self.numel if self.weights else 0.0


def make_plan(sparsity: Sparsity, weights: list[Weight], chunks: int) -> Plan:
    """Gives every block weight the level of the first rule that matches it, else the default level.

    Args:
        weights: all parameters of the model; only those marked `linear` can be sparse.
        chunks: C, the number of query groups: the largest tensor-parallel degree the model allows. Weights of blocks
            may be cut into fewer, see `blocks.block_chunks`.

    Raises:
        ValueError: a rule that matches nothing that can be sparse, or a weight that blocks do not divide, or that
            cannot be 2:4.
    """
    candidates = [w for w in weights if w.linear]
    used: set[int] = set()
    plan: dict[str, SparseWeight] = {}
    for weight in candidates:
        level = sparsity.level
        for number, rule in enumerate(sparsity.rules):
            if fnmatch.fnmatchcase(weight.name, rule.weights):
                level = rule.level
                used.add(number)
                break
        if level > 0.0:
            block = sparsity.block if sparsity.pattern == "block" else None
            place = weight.name, weight.shape, weight.axis
            cut = block_chunks(*place, chunks, level, block)
            two_four = sparsity.pattern == "2:4"
            if two_four:
                check_two_four(*place, cut, level)
            plan[weight.name] = SparseWeight(*place, cut, level, block, two_four)
    _refuse_idle_rules(sparsity, used, candidates, weights)
    return Plan(sparsity.seed, plan, sparsity.expand)


def check_tensor(plan: Plan, tensor: int) -> None:
    """That every tensor-parallel rank holds whole chunks.

    Raises:
        ValueError: a weight of blocks has too few chunks for that.
    """
    for w in plan.weights.values():
        if w.chunks % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide the {w.chunks} chunks that balanced blocks of "
                             f"sparsity.block={w.block} leave {w.name} ({w.shape[0]} x {w.shape[1]}) at level "
                             f"{w.level}; tensor may be a divisor of {_fewest_chunks(plan)}, or take smaller blocks, "
                             "or a level that is a coarser fraction")


def _fewest_chunks(plan: Plan) -> int:
    """The largest tensor-parallel degree of a plan."""
    return math.gcd(*(w.chunks for w in plan.weights.values()))


def _refuse_idle_rules(sparsity: Sparsity, used: set[int], candidates: list[Weight], weights: list[Weight]) -> None:
    for number, rule in enumerate(sparsity.rules):
        if number in used:
            continue
        if any(fnmatch.fnmatchcase(w.name, rule.weights) for w in candidates):
            why = "every weight it matches is taken by an earlier rule; put it before that one or remove it"
        elif any(fnmatch.fnmatchcase(w.name, rule.weights) for w in weights):
            why = "it matches only embeddings, norms or biases, which stay dense; remove it"
        else:
            why = f"no weight has such a name; they look like {', '.join(w.name for w in candidates[:4])}"
        raise ValueError(f"sparsity.rules.{number}: weights={rule.weights!r} decides nothing: {why}")


def render_plan(plan: Plan) -> str:
    """The plan as a table, layers of one kind and level in one row."""
    rows: dict[tuple[str, tuple[int, int], float], list[SparseWeight]] = {}
    for w in plan.weights.values():
        kind = ".".join("*" if part.isdigit() else part for part in w.name.split("."))
        rows.setdefault((kind, w.shape, w.level), []).append(w)
    if not rows:
        return "sparsity plan: dense, every weight is active"
    lines = [f"sparsity plan (mask seed {plan.seed}): {plan.active:,} of {plan.numel:,} block weights active, "
             f"sparsity {plan.sparsity:.4%}{_render_pattern(plan)}",
             f"  {'weight':<48}{'count':>6}{'shape':>16}{'chunks':>8}{'active/chunk':>14}{'sparsity':>11}"]
    for (kind, shape, _), group in rows.items():
        w = group[0]
        lines.append(f"  {kind:<48}{len(group):>6}{f'{shape[0]} x {shape[1]}':>16}{w.chunks:>8}"
                     f"{w.active_per_chunk:>14,}{w.sparsity:>11.4%}")
    return "\n".join(lines)


def _render_pattern(plan: Plan) -> str:
    """What blocks make of the levels asked for; nothing for unstructured masks."""
    if any(w.two_four for w in plan.weights.values()):
        return "; 2:4, two of every four weights along rows and along columns"
    blocks = [w for w in plan.weights.values() if w.block]
    if not blocks:
        return ""
    levels = ", ".join(f"{level:g}" for level in sorted({w.level for w in blocks}))
    return (f"; balanced blocks of {blocks[0].block} x {blocks[0].block}, to which level {levels} is rounded below; "
            f"tensor-parallel degrees: divisors of {_fewest_chunks(plan)}")
