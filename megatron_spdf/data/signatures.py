"""Packed formats of files by how they begin, whatever their names say."""

from __future__ import annotations

import re
from pathlib import Path

_BEGINNINGS = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd", ".parquet": rb"PAR1",
               ".zip": rb"PK\x03\x04", ".xz": rb"\xfd7zXZ\x00", ".bz2": rb"BZh[1-9]1AY&SY"}


def format_of_content(path: Path) -> str | None:
    """Suffix of the packed format that a file begins as, such as ".gz"; None for any other."""
    with path.open("rb") as file:
        start = file.read(16)
    return next((suffix for suffix, own in _BEGINNINGS.items() if re.match(own, start)), None)
