"""Counts what a rank hands to its collectives, by operation and process group."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# The payload is the larger of what goes in and what comes out, so that a reduce-scatter and the all-gather of the
# same buffer count alike, and an in-place all-reduce once.
_IGNORED = {"barrier", "monitored_barrier_"}


class TrafficCounter(TorchDispatchMode):
    """While entered, adds up the payload bytes of every c10d operation of this thread.

    Attributes:
        bytes: (operation, group name) -> bytes; point-to-point operations count what is sent.
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
            self._count(schema.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple) -> None:
        if operation in _IGNORED or operation.startswith("recv"):
            return
        sides = [sum(t.numel() * t.element_size() for t in tree_flatten(a)[0] if isinstance(t, Tensor)) for a in args]
        self.bytes[operation, _group_name(args)] += max(sides, default=0)


def _group_name(args: tuple) -> str:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(argument).group_desc
            except (RuntimeError, TypeError):
                continue
    return "world"
