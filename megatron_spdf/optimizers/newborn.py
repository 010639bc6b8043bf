"""Optimizer state of values that are born while a run goes on.

A running average s of a power p of the gradient starts at zero, s <- b s + (1 - b) g^p, and Adam
divides it by 1 - b^t for that. A value that is born at a move starts at zero too, but t is the
count of the whole run, which corrects nothing any more: at b2 = 0.999 its updates are up to 6.6
times too large.

The engines' own optimizers stay as they are. Beside their state each value has its age, the number
of updates since it was born. Its averages are kept as r(a) s, with a factor r that makes the
optimizer's formula give what is wanted:

    ages    r(a) = (1 - b^t) / (1 - b^a): bias is corrected by the value's own age
    ramp    r(a) = min(a / n, 1) of the first average: the update grows over n steps

Before an update r(a - 1) s becomes r(a) s + (r(a) - 1) (1 - b) / b g^p, which the optimizer's own
step turns into r(a) times the average of the next step: the algebra is exact, beside rounding. A
value that has been there from the start has r = 1 and is not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_spdf.optimizers.base import Average, Optimizer
from megatron_spdf.sparsity.algorithms.base import Births, MaskAlgorithm

if TYPE_CHECKING:  # the planner goes without PyTorch
    import torch
    from torch import Tensor

AGE = "age"  # the name of its state: updates since a value was born
CHUNK = 2**20  # values that are corrected at a time, which bounds what is held beside them
ROUNDED = 25 * math.log(2.0)  # e^-this is nothing beside 1 in fp32
LONGEST = 2**20  # updates, which bounds the tables
COLD = 1.5  # times the usual, from where first updates are corrected by default, or warned of


def newborn_of(algorithm: MaskAlgorithm, optimizer: Optimizer) -> Newborn | None:
    """What corrects the state of what is born; None: nothing does, or nothing is born."""
    if not isinstance(algorithm, Births) or not optimizer.averages:
        return None
    rule = algorithm.newborn
    if rule == "auto":
        rule = "ages" if optimizer.largest_first_updates >= COLD else "plain"
    return None if rule == "plain" else Newborn(rule, optimizer.averages, algorithm.ramp)


def newborn_violations(algorithm: MaskAlgorithm, optimizer: Optimizer) -> Iterator[str]:
    """What does not go, as sentences."""
    if not isinstance(algorithm, Births):
        return
    usual = Births.model_fields["ramp"].default
    if algorithm.newborn != "ramp" and algorithm.ramp != usual:
        yield (f"sparsity.update.ramp={algorithm.ramp} says nothing where newborn="
               f"{algorithm.newborn}; set newborn=ramp, or leave it out")
    if algorithm.newborn in ("auto", "plain"):
        return
    rule = f"sparsity.update.newborn={algorithm.newborn}"
    if not optimizer.averages:
        yield (f"{rule} corrects running averages of the gradient, and optimizer.name="
               f"{optimizer.name} names none that start at zero; set newborn=plain")
    elif algorithm.newborn == "ramp" and not any(
            average.decay for average in optimizer.averages.values() if average.power == 1):
        yield (f"{rule} scales the first moment that is kept, and optimizer.beta1=0 keeps none; "
               "set newborn=ages or a larger beta1")


@dataclass(frozen=True)
class Newborn:
    """Corrects the running averages of an optimizer for what is born.

    Args:
        rule: see above.
        averages: named state -> what it averages.
        ramp: n, in updates.
    """

    rule: Literal["ages", "ramp"]
    averages: Mapping[str, Average]
    ramp: int

    def start(self, optimizer: torch.optim.Optimizer, masters: Iterable[Tensor]) -> None:
        """Gives fp32 masters the age that they have before the first update."""
        import torch

        for master in masters:
            optimizer.state[master][AGE] = torch.zeros_like(master)

    def attach(self, optimizer: torch.optim.Optimizer, steps: Callable[[], int]) -> None:
        """Corrects before every update of an optimizer from here on.

        Args:
            steps: gives the number of updates done.
        """
        import torch

        # of a step and device: ZeRO-3 updates a step's parameters group by group
        tables = lru_cache(maxsize=1)(self._tables)

        @torch.no_grad()
        def correct(optimizer: torch.optim.Optimizer, *_) -> None:
            for group in optimizer.param_groups:
                for master in (p for p in group["params"] if p.grad is not None):
                    self._correct(optimizer.state[master], master.grad,
                                  tables(steps() + 1, master.device))

        optimizer.register_step_pre_hook(correct)

    def _correct(self, state: dict[str, Tensor], gradient: Tensor,
                 tables: dict[str, list[Tensor]]) -> None:
        """Corrects the moments of one master, chunk by chunk."""
        names = [AGE, *tables]
        for age, *averages, g in _chunks([*(state[name] for name in names), gradient]):
            for name, average in zip(tables, averages, strict=True):
                keep, add = tables[name]
                at = age.clamp(max=len(keep) - 1).int()
                power = g.float() if self.averages[name].power == 1 else g.float() ** 2
                average.mul_(keep[at]).addcmul_(power, add[at])
            age += 1.0

    def _tables(self, step: int, device: torch.device) -> dict[str, list[Tensor]]:
        """Named state -> by age before the update, what the average and what the gradient's power
        are multiplied with; fp32, the last entry for all that are older."""
        import torch

        return {name: [torch.from_numpy(table).to(device)
                       for table in self._factors_of(average, step)]
                for name, average in self.averages.items()
                if average.decay > 0.0 and not (self.rule == "ramp" and average.power != 1)}

    def _factors_of(self, average: Average, step: int) -> tuple[np.ndarray, np.ndarray]:
        b = average.decay
        ages = np.arange(self._grown(b) + 1, dtype=np.float64)
        before, now = self._scale(b, ages, step - 1), self._scale(b, ages + 1.0, step)
        # the averages of what was just born are zero, and so are all before the first step
        before[0 if step > 1 else slice(None)] = 1.0
        keep, add = now / before, (now - 1.0) * (1.0 - b) / b
        old = np.r_[min(step - 1, len(ages) - 1), len(ages) - 1]  # from the start, and grown up
        keep[old], add[old] = 1.0, 0.0
        return keep.astype(np.float32), add.astype(np.float32)

    def _scale(self, decay: float, ages: np.ndarray, step: int) -> np.ndarray:
        """r(a) at the end of a step; without meaning at age 0."""
        ages = np.maximum(ages, 1.0)
        if self.rule == "ramp":
            return np.minimum(ages / self.ramp, 1.0)
        return (1.0 - decay**step) / (1.0 - decay**ages)

    def _grown(self, decay: float) -> int:
        """The age from which a value counts as one that was there from the start."""
        if self.rule == "ramp":
            return self.ramp
        return min(LONGEST, math.ceil(ROUNDED / -math.log(decay)))


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Views of so many values of tensors of one shape, which are contiguous."""
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), CHUNK):
        yield [tensor[start : start + CHUNK] for tensor in flat]
