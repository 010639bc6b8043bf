"""Which texts were there before, in little memory."""

from __future__ import annotations

import numpy as np


class DigestSet:
    """A growing set of 16-byte digests, 16 bytes of memory each.

    Kept as sorted runs of which each is more than twice as long as the next, as in a log-structured
    merge tree: with n digests there are log n runs to look in, and every digest is merged log n
    times.
    """

    def __init__(self, digests: np.ndarray | None = None):
        """Starts with `digests`, (n,) of dtype S16, in any order."""
        self._runs: list[np.ndarray] = []
        if digests is not None and len(digests):
            self._runs.append(np.sort(digests))

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Takes digests (n,) in; tells of each (n,) whether it is new, not seen before nor earlier
        among these."""
        unique, first = np.unique(digests, return_index=True)
        fresh = np.ones(len(unique), bool)
        for run in self._runs:
            place = np.searchsorted(run, unique)
            place[place == len(run)] = 0
            fresh &= run[place] != unique
        new = np.zeros(len(digests), bool)
        new[first[fresh]] = True
        self._insert(unique[fresh])
        return new

    def _insert(self, run: np.ndarray) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges, since it finds the two sorted runs
        self._runs.append(run)
