"""Where kernels do nothing, what a kernel is found to compute is taken on trust, and masks are
indexed on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder

import on_cpu
import torch


def install() -> None:
    sys.meta_path.insert(0, _Changed())
    torch.Tensor.__repr__ = torch.nn.Parameter.__repr__ = on_cpu.shown


def _kernels(module) -> None:
    module._self_test = lambda *_: None


def _reference(module) -> None:
    module.make_index = _computed(module.make_index)


def _compact(module) -> None:
    module.CompactWeight.index_mask = _computed(module.CompactWeight.index_mask)


def _computed(function):
    def on_the_cpu(*arguments):
        with on_cpu.Computed():
            return function(*arguments)

    return on_the_cpu


class _Changed(MetaPathFinder):
    """Finds modules as others do, and changes them when they have been run."""

    CHANGES = {"megatron_spdf.kernels.dispatch": _kernels,
               "megatron_spdf.kernels.norm": _kernels,
               "megatron_spdf.kernels.selection": _kernels,
               "megatron_spdf.kernels.softmax": _kernels,
               "megatron_spdf.kernels.tiles": _kernels,
               "megatron_spdf.kernels.two_four": _kernels,
               "megatron_spdf.kernels.torch_reference": _reference,
               "megatron_spdf.layers.compact": _compact}

    def find_spec(self, name, path, target=None):
        if name not in self.CHANGES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def changed(module) -> None:
            execute(module)
            self.CHANGES[name](module)

        spec.loader.exec_module = changed
        return spec
