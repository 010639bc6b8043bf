"""Refuses pickled code in a checkpoint's index.

Megatron-Core's format keeps its index, `.metadata`, as a pickle that PyTorch loads without
restriction. An unpickler that allows the classes of such an index, each by name, reads it first.
Allowing whole modules would not do: they import others (`os`, through several doors) that can run a
command.
"""

from __future__ import annotations

import pickle
from pathlib import Path

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "collections": {"OrderedDict"}, "builtins": {"set", "frozenset"}, "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"}, "pathlib": {"PosixPath", "Path"},
}
_DTYPES = {"float32", "float16", "bfloat16", "float64", "uint8", "int8", "int16", "int32", "int64",
           "bool"}


class _Vetting(pickle.Unpickler):
    """Unpickler that allows index classes only."""

    def find_class(self, module: str, name: str):
        """Looks up an allowed class.

        Raises:
            UnpicklingError: the class is another.
        """
        if name in _CLASSES.get(module, ()) or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def vet_metadata(checkpoint: Path) -> None:
    """Reads a checkpoint's `.metadata` with nothing but index classes allowed.

    Args:
        checkpoint: directory of the checkpoint.

    Raises:
        ValueError: the index holds anything else, or cannot be read.
    """
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            if type(_Vetting(file).load()).__name__ != "Metadata":
                raise pickle.UnpicklingError("it holds something else")
    except (pickle.UnpicklingError, EOFError, OSError, AttributeError, ImportError, IndexError,
            TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error}. It is a pickle and "
                         "could run code, so it is refused; use a checkpoint that this program "
                         "wrote") from None
