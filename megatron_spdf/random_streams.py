"""Counter-based random streams keyed by words, the same on every rank and layout."""

from __future__ import annotations

import hashlib

import numpy as np


def stream_key(*words: object) -> np.ndarray:
    """128-bit Philox key of a tuple of words, (2,) uint64."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8")
