"""Sparse models with the FLOPs of a dense one: Sparse-IFT (Saxena et al. 2023, arXiv 2303.11525,
section 3).

At sparsity s the dense recipe's layers grow until they have as many active weights as before:

- Sparse Wide: every width times k = 1 / sqrt(1 - s), since a weight has two of them.
- Sparse Parallel: 1 / (1 - s) copies of a layer, each with its nonlinearity, whose outputs are
  summed. Of W_I and W_O that is one feed-forward layer so many times wider, of attention so many
  times more heads; the width of the model stays.

Widths are whole heads, and multiples that tensor cores and tensor-parallel ranks divide evenly.
What rounding leaves, and what attention and the LM head grow, the level can take up: each family
comes a second time at the sparsity at which a token costs what it costs dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_spdf.architecture.base import Model, divisors
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import Flops, training_flops
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import Column, Table, Unit

TENSOR_CORES = 64  # a width is a multiple of so many, or of 8 where that is too coarse
FINE = 8
COARSE_FROM = 16 * TENSOR_CORES  # from here rounding to 64 changes a width by at most 1/32
NODE = 8  # ranks among which tensor parallelism usually stays
DIGITS = 4  # of a level that is computed
CLOSE = 1e-4  # FLOPs that differ by less, relative to the dense ones, are equal
MLP = "*.mlp.*"
ABSENT = {
    "Sparse Factorized": "puts two factors with a nonlinearity between them in the place of a "
                         "weight, and no layer here has such factors",
    "Sparse Doped": "adds a dense product of low rank to a sparse weight, and no layer here has "
                    "one",
}
MILLIONS = Unit("M", 1e6)
MFLOP = Unit("MFLOP", 1e6)


@dataclass(frozen=True)
class Variant:
    """A sparse recipe beside the dense one.

    Attributes:
        family: of Sparse-IFT, and what it applies to.
        words: overrides of the dense recipe.
        recipe: with the overrides.
    """

    family: str
    words: tuple[str, ...]
    recipe: Recipe

    @property
    def flops(self) -> Flops:
        """FLOPs per trained token, of active weights alone."""
        return _flops(self.recipe)


def variants(dense: Recipe, level: float, load: Callable[[Sequence[str]], Recipe],
             tensor: int | None = None) -> list[Variant]:
    """The dense recipe, and every family of Sparse-IFT that applies to it.

    Args:
        dense: recipe.
        level: sparsity s of the grown layers, in (0, 1).
        load: overrides -> the recipe with them. Raises ValueError where they do not fit it.
        tensor: tensor-parallel ranks that must divide heads and widths; default: the recipe's, and
            those up to 8 that divide the dense model.

    Raises:
        ValueError: the recipe is sparse already, or has stages.
    """
    if dense.stages:
        raise ValueError("the recipe has stages, whose sparsities change; name one without")
    if Plan.of(dense).weights:
        raise ValueError(f"the recipe is sparse already, sparsity.level={dense.sparsity.level:g}; "
                         "name the dense one, or add sparsity=0")
    target, found = _flops(dense).total, [Variant("dense", (), dense)]
    for family, tag, widths, share in _families(dense, level, tensor):

        def at(s: float, family=family, tag=tag, widths=widths, share=share) -> Variant:
            words = (*widths, *share(s), f"output={dense.output}_{tag}{100 * s:.4g}")
            return Variant(family, words, load(words))

        found.append(at(level))
        if equal := _equal(at, target, level):
            found.append(replace(equal, family=f"{family}, equal in all"))
    return found


def _families(dense: Recipe, level: float, tensor: int | None
              ) -> Iterator[tuple[str, str, list[str], Callable[[float], list[str]]]]:
    """Name, part of an output's name, overrides of widths, and overrides of a level, of each family
    that applies."""
    model, ranks = dense.model, _ranks(dense, tensor)
    wide, copies = 1.0 / math.sqrt(1.0 - level), 1.0 / (1.0 - level)
    yield (f"Sparse Wide, x {wide:.4g}", "wide", _widened(model, wide, wide, wide, ranks),
           _everywhere)
    if _has_head_width(model):
        yield (f"Sparse Parallel, x {copies:.4g}", "parallel",
               _widened(model, 1.0, copies, copies, ranks), _everywhere)
    inner = _round(model.ffn_hidden * copies, model.slices)
    yield (f"Sparse Parallel of MLPs, x {copies:.4g}", "parallel_mlp",
           [f"model.ffn_hidden={inner}"], _in_mlp)


def _everywhere(level: float) -> list[str]:
    return [f"sparsity.level={level:.12g}"]


def _in_mlp(level: float) -> list[str]:
    return ["sparsity.level=0", f'sparsity.rules=[{{weights: "{MLP}", level: {level:.12g}}}]']


def _has_head_width(model: Model) -> bool:
    """True if the width of a head is a key of its own."""
    return "head_width" in type(model).model_fields


def _widened(model: Model, hidden: float, heads: float, inner: float, ranks: int) -> list[str]:
    """Overrides of the widths, which grow by the factors given.

    The width of a head stays. Where it has no key of its own, the model is as wide as its heads.
    """
    groups = _groups(model.query_groups * heads, ranks)
    parts = math.lcm(groups, ranks)
    many = _nearest(model.heads * heads, parts)
    sizes = {"hidden": many * model.head_width, "heads": many, "query_groups": groups,
             "ffn_hidden": _round(model.ffn_hidden * inner, parts)}
    if _has_head_width(model):
        wide = model.hidden if hidden == 1.0 else _round(model.hidden * hidden, 1)
        sizes |= {"hidden": wide, "head_width": model.head_width, "slices": parts}
    return [f"model.{key}={size}" for key, size in sizes.items()]


def _ranks(dense: Recipe, tensor: int | None) -> int:
    """Tensor-parallel ranks that the grown model must allow."""
    if tensor is not None:
        return tensor
    usual = max(n for n in dense.model.tensor_degrees() if NODE % n == 0)
    return math.lcm(dense.parallel.tensor, usual)


def _groups(wanted: float, ranks: int) -> int:
    """The nearest number of query groups that share ranks evenly, or the reverse."""
    multiples = range(ranks, 2 * math.ceil(wanted) + ranks + 1, ranks)
    return min([*divisors(ranks), *multiples], key=lambda n: (abs(n - wanted), n))


def _round(size: float, parts: int) -> int:
    """The nearest width that tensor cores like, in so many equal parts that they like as well."""
    whole = TENSOR_CORES if size >= COARSE_FROM else FINE
    return _nearest(size, math.lcm(whole, FINE * parts))


def _nearest(size: float, multiple: int) -> int:
    return max(1, math.floor(size / multiple + 0.5)) * multiple


def _equal(at: Callable[[float], Variant], target: float, level: float) -> Variant | None:
    """The variant at the sparsity at which it costs so many FLOPs, which are linear in it; None: it
    does at this one, or at none that its pattern can have."""
    here, higher = at(level).flops.total, (1.0 + level) / 2.0
    if abs(target / here - 1.0) <= CLOSE:
        return None
    try:
        there = at(higher).flops.total
        found = round(level + (target - here) * (higher - level) / (there - here), DIGITS)
        return at(found) if 0.0 < found < 1.0 else None
    except ValueError:  # of a pattern with one level
        return None


def _flops(recipe: Recipe) -> Flops:
    return training_flops(recipe.model, recipe.train.sequence_length, Plan.of(recipe))


def describe_variants(found: Sequence[Variant], path: str, given: Sequence[str]) -> dict[str, Any]:
    """Facts about variants, the dense recipe first, for a table or for JSON.

    Args:
        found: of `variants`.
        path: of the recipe, for commands.
        given: overrides that the dense recipe has.
    """
    dense = found[0].flops.total
    rows = []
    for variant in found:
        model, plan, flops = variant.recipe.model, Plan.of(variant.recipe), variant.flops
        weights = model.weights()
        linear, zero = sum(w.numel for w in weights if w.linear), plan.numel - plan.active
        rows.append({
            "family": variant.family, "hidden": model.hidden, "heads": model.heads,
            "head_width": model.head_width, "ffn_hidden": model.ffn_hidden,
            "linear_weights": linear, "active": linear - zero,
            "all_active": sum(w.numel for w in weights) - zero,
            "linear": flops.linear, "attention": flops.attention, "logits": flops.logits,
            "total": flops.total, "of_dense": flops.total / dense,
            "overrides": list(variant.words)})
    return {"recipe": path, "given": list(given), "sequence_length":
            found[0].recipe.train.sequence_length, "variants": rows, "absent": ABSENT}


def render_variants(facts: dict[str, Any]) -> str:
    """A table of variants, all of active weights, then a command for each, then the families that
    do not apply."""
    columns = [
        Column("", "family"), Column("hidden", "hidden", "d"),
        Column("heads", lambda row: f"{row['heads']} x {row['head_width']}", align="right"),
        Column("feed-forward", "ffn_hidden", "d"),
        Column("linear weights", "linear_weights", ".2f", MILLIONS),
        Column("active", "active", ".2f", MILLIONS),
        Column("all parameters", "all_active", ".2f", MILLIONS),
        *(Column(part, part, ".2f", MFLOP) for part in ("linear", "attention", "logits", "total")),
        Column("against dense", lambda row: f"{row['of_dense'] - 1:+.2%}", align="right")]
    rows = facts["variants"]
    given = "".join(f" {_quoted(word)}" for word in facts["given"])
    commands = [f"{row['family']}:\n  pretrain.py {facts['recipe']}{given} "
                + " ".join(map(_quoted, row["overrides"])) for row in rows[1:]]
    absent = [f"{name} does not apply: it {why}." for name, why in facts["absent"].items()]
    head = (f"FLOPs per trained token, sequences of {facts['sequence_length']:,}, attention not "
            "halved for causality; all parameters are those that are active")
    return "\n\n".join([head, Table(columns, rows).text(), *commands, "\n".join(absent)])


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set(' "{[*') else word
