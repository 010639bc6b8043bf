"""Rates at which a GPU and its host do the work of a step, as they were measured.

`measured_rates.json` beside this file has them, with card, date and versions; `tools/benchmark.py
rates` fits them to a report of the suite. They are shares of a GPU's own peak rates, so that other
GPUs get them too, for which they are a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_spdf.records.json_reader import read_json
from megatron_spdf.sparsity.plan import Plan, SparseWeight

FILE = Path(__file__).with_name("measured_rates.json")
DENSE = "dense"  # weights that are multiplied as dense ones, whatever their pattern


@dataclass(frozen=True)
class Rates:
    """What a step is predicted with.

    Attributes:
        products: share of the peak rate that dense products reach.
        attention: rate of attention, over that of dense products.
        memory: share of the memory's bandwidth that everything else reaches.
        patterns: name of `Pattern.product_rate` -> rate of its products by the FLOPs that are
            executed, over that of dense products.
        host: name of a pattern -> seconds that the host needs to launch forward and backward of a
            layer for a micro-batch.
        source: card, date and versions.
    """

    products: float
    attention: float
    memory: float
    patterns: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def at(self, efficiency: float) -> Rates:
        """The rates where dense products reach a given share of the peak. The host counts as
        nothing: of a run that was measured the efficiency holds it."""
        return replace(self, products=efficiency, host={})

    def relative(self, weight: SparseWeight) -> float:
        """Rate of a weight's products over that of dense ones. Of tiles of a size that was not
        measured it is that of the next smaller one that was."""
        asked = weight.pattern.product_rate
        if weight.algorithm.keeps or asked == DENSE:
            return 1.0
        if asked in self.patterns:
            return self.patterns[asked]
        kind, _, size = asked.rpartition(" ")
        sizes = {int(name.rpartition(" ")[2]): rate for name, rate in self.patterns.items()
                 if kind and name.rpartition(" ")[0] == kind}
        if not sizes:
            return 1.0
        return sizes[max((known for known in sizes if known <= int(size)), default=min(sizes))]

    def host_seconds(self, plan: Plan) -> float:
        """Seconds of the host for a layer and a micro-batch, by the pattern that takes it longest;
        one that was not measured counts as unstructured."""
        names = {weight.pattern.name for weight in plan.weights.values()} or {DENSE}
        return max(self.host.get(name, self.host.get("unstructured", 0.0)) for name in names)


def read_rates(path: Path = FILE) -> Rates:
    """Raises Unreadable where the file has no rates."""
    return read_json(path, Rates, remedy="write it with tools/benchmark.py rates")


MEASURED = read_rates()
