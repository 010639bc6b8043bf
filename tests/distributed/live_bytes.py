"""Bytes of tensors alive, and the most there were: a measure of activations where no GPU counts
them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, follows the storage of every tensor that an operation returns until it is
    freed.

    Args:
        kept: tensors that were there before and do not count.

    Attributes:
        peak: the most bytes alive at once.
    """

    def __init__(self, kept: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, object] = {t.untyped_storage()._cdata: t for t in kept}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
