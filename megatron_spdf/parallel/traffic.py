"""Bytes that a rank hands to its collectives, by operation and process group."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_SILENT = {"barrier", "monitored_barrier"}


class TrafficCounter(TorchDispatchMode):
    """Context that adds up the payload of every c10d operation of this thread.

    Groups of one rank send nothing and are not counted. The payload is the larger of input and
    output, so that a reduce-scatter and the all-gather of one buffer count alike. Of point-to-point
    operations the sends count.

    Attributes:
        bytes: (operation, group) -> bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema.name
        if schema.startswith("c10d::"):
            self._count(schema.removeprefix("c10d::").rstrip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple) -> None:
        if operation in _SILENT or operation.startswith("recv"):
            return
        group = next(g for g in map(_group_of, args) if g is not None)
        if group.size() > 1:
            sides = (sum(t.nbytes for t in tree_flatten(a)[0] if isinstance(t, Tensor))
                     for a in args)
            self.bytes[operation, group.group_desc] += max(sides)


def _group_of(argument: object) -> ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):  # a reduce operation, which is a ScriptObject too
        return None
