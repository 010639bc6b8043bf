"""Looks at weights that another tool made, before they become weights of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_spdf.checkpoint.pickles import Forbidden, NotData
from megatron_spdf.checkpoint.torch_file import read_file
from megatron_spdf.files import open_regular, require_fetched
from megatron_spdf.paths import real
from megatron_spdf.text import printable

_MOST_WORD = 200  # bytes of a file that names a directory


def require_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Returns a tensor of `path` unchanged.

    Raises:
        ValueError: it has entries that are not numbers, or none in float32.
    """
    finite = torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor)
    if finite.all():
        return tensor
    first = tuple(torch.nonzero(~finite)[0].tolist())
    raise ValueError(f"{path}: {name} has {int((~finite).sum()):,} entries that are not finite "
                     f"numbers, the first of them {tensor[first].item()} at {list(first)}; use a "
                     "model that has not diverged, or copy the file again")


def place_of(directory: Path, name: object, said_by: Path) -> Path:
    """Path of a file or directory that a file of another tool names.

    Args:
        directory: in which it must be, or beside it in the blobs of Hugging Face's cache, where a
            model's files are links.
        said_by: the file that names it.

    Raises:
        ValueError: it is not a plain name, a link that leads out of the directory, or a pointer in
            the place of a file.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or (
            not name.isprintable() or len(name) > 255):
        raise ValueError(f"{said_by} names {printable(str(name)[:100])!r}, which is no file "
                         f"beside it; it may only name what lies in {directory}, without a path")
    inside, found = real(directory), real(directory / name)
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else inside
    if not any(found.is_relative_to(root) for root in (inside, blobs)):
        raise ValueError(f"{directory / name} is a link that leads out of {directory}; put the "
                         "file itself there")
    require_fetched(directory / name)
    return directory / name


def read_word(file: Path) -> str:
    """Word in a small file, such as the one that names the newest checkpoint.

    Raises:
        ValueError: it is larger, not text, or no regular file.
    """
    try:
        with open_regular(file) as opened:
            content = opened.read(_MOST_WORD + 1)
        if len(content) > _MOST_WORD:
            raise ValueError(f"it has more than {_MOST_WORD} bytes")
        return content.decode().strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); give the checkpoint's own directory"
                         ) from None


def read_pickled(file: Path, remedy: str, allowed: Collection[str] = ()) -> Any:
    """Reads a file of `torch.save` as data; see `torch_file.read_file`.

    Args:
        remedy: where it asks for more than data.

    Raises:
        ValueError: it could run code, or cannot be read.
    """
    try:
        return read_file(real(file), allowed)
    except Forbidden as error:
        raise ValueError(f"{file} cannot be read without running code ({error}), so it is refused; "
                         f"{remedy}") from None
    except (NotData, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy the file again") from None
