"""Refuses pickled code. Megatron-Core's format keeps its index, `.metadata`, as a pickle that PyTorch loads without
restriction; here it is first read by an unpickler that knows the classes of such an index and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path

_ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
                    "torch.distributed.checkpoint.planner")
_ALLOWED = {
    ("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "Path"),
}
_DTYPES = {"float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"}


class _Vetting(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        plain = "." not in name
        if plain and ((module, name) in _ALLOWED or module in _ALLOWED_MODULES or
                      (module == "torch" and name in _DTYPES)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def vet_metadata(checkpoint: Path) -> None:
    """Reads a checkpoint's `.metadata` with nothing but index classes allowed.

    Raises:
        ValueError: it holds anything else, or cannot be read.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _Vetting(file).load()
    except (pickle.UnpicklingError, EOFError, OSError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error}. It is a pickle and could run code, so "
                         "it is refused; use a checkpoint that this program wrote") from None
