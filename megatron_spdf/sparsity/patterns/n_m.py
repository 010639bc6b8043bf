"""n:m masks (Zhou et al. 2021): of every m consecutive inputs of an output, n are active.

n counts what is kept, as in the paper, and not what is pruned. Sparse tensor cores take 2:4 along
the inputs for the forward pass alone; the pattern `2:4` serves both passes and is a harder one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Philox
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_spdf.random_streams import stream_key
from megatron_spdf.section import MOST_WIDTH
from megatron_spdf.sparsity.patterns.base import PATTERNS, Pattern, Shape

if TYPE_CHECKING:  # the planner goes without PyTorch
    from torch import Tensor

STREAM = "megatron_spdf n:m stream 1"


class NofM(Pattern):
    """n of every m consecutive inputs."""

    name = "n_m"

    n: int = Field(2, gt=0, le=MOST_WIDTH,
                   description="pattern n_m: active of every `m` consecutive inputs")
    m: int = Field(4, gt=1, le=MOST_WIDTH,
                   description="pattern n_m: inputs that are compared with each other")

    @property
    def columns_together(self) -> int:  # type: ignore[override]
        return self.m

    @model_validator(mode="after")
    def _leaves_zeros(self) -> NofM:
        if self.n >= self.m:
            raise PydanticCustomError(
                "order", "n={n} of every m={m} leaves no zeros; n is what stays active, so lower "
                         "it or raise m", {"n": self.n, "m": self.m})
        return self

    def cut(self, name: str, shape: Shape, axis: int, most: int, level: float) -> int:
        what = (f"sparsity.pattern=n_m with n={self.n}, m={self.m} on {name} "
                f"({shape[0]} x {shape[1]})")
        own = 1.0 - self.n / self.m
        if not math.isclose(level, own):
            raise ValueError(f"{what}: level={level:g}, and {self.n} of every {self.m} active are "
                             f"level {own:g}; take that, another n or m, or 0 in a rule for "
                             "weights that stay dense")
        fitting = [c for c in range(1, most + 1) if most % c == 0
                   and shape[1] // (c if axis == 1 else 1) % self.m == 0]
        if not fitting:
            raise ValueError(f"{what}: its {shape[1]} inputs are no multiple of m; take another m, "
                             "or give the weight a rule with level 0 that keeps it dense")
        return fitting[-1]

    def active(self, shape: Shape, level: float) -> int:
        return shape[0] * shape[1] // self.m * self.n

    def draw(self, seed: int, name: str, slice_id: int, shape: Shape, level: float) -> np.ndarray:
        words = Philox(key=stream_key(STREAM, seed, name, slice_id)).random_raw(math.prod(shape))
        order = words.reshape(-1, self.m).argsort(-1, kind="stable")
        mask = np.zeros(order.shape, bool)
        np.put_along_axis(mask, order[:, : self.n], True, -1)
        return mask.reshape(shape)

    def fault(self, masks: np.ndarray, shape: Shape, level: float) -> str | None:
        active = masks.reshape(-1, self.m).sum(-1, dtype=np.int64)
        return None if (active == self.n).all() else f"{self.n} of every {self.m} inputs"

    def chosen(self, magnitudes: Tensor, level: float) -> Tensor:
        from megatron_spdf.sparsity.largest import keep_largest_of_few

        return keep_largest_of_few(magnitudes.reshape(-1, self.m), self.n).view_as(magnitudes)

    def describe(self, levels: list[float], degrees: int) -> str:
        return f"{self.n} of every {self.m} consecutive inputs are active"


PATTERNS.register(NofM.name, NofM)
