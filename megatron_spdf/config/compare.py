"""How two recipes differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """One phrase for every value that differs between two nested mappings, in the order of the first."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{place}.{key}" if place else key)
    elif there != here:
        yield f"{place} is {there} there and {here} here"
