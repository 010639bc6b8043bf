"""AC/DC (Peste et al. 2021): alternately compressed and decompressed training.

Dense and sparse parts take turns. At every border to a sparse part the largest magnitudes of each
slice stay; in a dense part what was masked begins at zero. Entries that stay keep their optimizer
state. The defaults are the shares of the paper's 100 epochs on ImageNet, which ranks whole networks
or layers: dense for 10, then 5 sparse and 5 dense by turns, the last dense part from 75 to 85, and
sparse to the end.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, Births, NewbornRule, Part


class AcDc(Births):
    """Keys of AC/DC, all of them shares of the run's or stage's steps."""

    name = "acdc"
    to_begin_sparse = "sparsity.update.start=0, so that it begins with a sparse part"

    newborn: NewbornRule = Field(
        "plain", description=Births.model_fields["newborn"].description)
    start: float = Field(0.10, ge=0.0, lt=1.0, description="at first dense")
    turn: float = Field(0.05, gt=0.0, lt=1.0, description="of each sparse and each dense part")
    last_dense: float = Field(0.75, gt=0.0, lt=1.0, description="where the last dense part begins")
    stop: float = Field(0.85, gt=0.0, lt=1.0, description="where it ends")

    @model_validator(mode="after")
    def _in_order(self) -> AcDc:
        if not self.start < self.last_dense < self.stop:
            raise PydanticCustomError(
                "order", "start={start}, last_dense={last_dense} and stop={stop} must ascend; "
                         "change one of them", self.model_dump())
        if self.turn > self.last_dense - self.start + 1e-9:
            raise PydanticCustomError(
                "order", "turn={turn} is longer than start={start} to last_dense={last_dense}, so "
                         "that nothing would be sparse in between; lower it",
                self.model_dump())
        return self

    def rule_violations(self, steps: int) -> Iterator[str]:
        if self.turn * steps < 1.0:
            yield (f"sparsity.update.turn={self.turn:g} of {steps:,} steps is no step; raise it, "
                   "or train longer")
        elif self.parts(steps)[-1].reached != 1.0:
            yield (f"sparsity.update.stop={self.stop:g} of {steps:,} steps leaves none that are "
                   "sparse at the end; lower it, or train longer")

    def parts(self, steps: int) -> list[Part]:
        turns = round((self.last_dense - self.start) / self.turn)
        shares = [self.start + turn * self.turn for turn in range(turns)]
        # sparse and dense by turns, and sparse before the last dense part
        shares = shares[: turns - 1 + turns % 2] + [self.last_dense, self.stop, 1.0]
        ends = [round(share * steps) for share in shares]
        parts = [Part(end, float(number % 2)) for number, end in enumerate(ends)]
        return [part for before, part in zip([Part(0, 0.0), *parts], parts, strict=False)
                if part.last > before.last]

    def describe(self) -> str:
        return (f"dense for {self.start:.0%} of the steps, then sparse and dense for "
                f"{self.turn:.0%} by turns, dense from {self.last_dense:.0%} to {self.stop:.0%}, "
                "and sparse")


ALGORITHMS.register(AcDc.name, AcDc)
