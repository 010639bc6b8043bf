"""An independent reference: how SET and RigL move tiles, in NumPy, with loops over all pairs.

Letters: a slice has R x C tiles.
"""

from __future__ import annotations

import numpy as np

from megatron_spdf.random_streams import random_words, stream_key


def sums(entries: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    """(R, C) float64, of the entries of each tile of a slice of this shape."""
    rows, columns = shape
    tiles = entries.reshape(rows // size, size, columns // size, size)
    return tiles.sum((1, 3), dtype=np.float64)


def norms(entries: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    """(R, C) float64, Euclidean."""
    return np.sqrt(sums(entries.astype(np.float64) ** 2, shape, size))


def random_births(active: np.ndarray, seed: int, name: str, slice_id: int,
                  update: int) -> np.ndarray:
    """SET's scores of the tiles that are not active, from the stored stream."""
    key = stream_key("megatron_spdf move stream 1", seed, name, slice_id, update, "be born")
    births = np.zeros(active.shape)
    births[~active] = random_words([int(key[0])], int((~active).sum()), "cpu")[0].numpy()
    return births


def next_tiles(active: np.ndarray, magnitude: np.ndarray, births: np.ndarray,
               count: int) -> np.ndarray:
    """The tiles after a move in which up to `count` die, an even number.

    Args:
        active: (R, C) bool.
        magnitude: (R, C); the lowest die first, ties by position.
        births: (R, C); pairs with the lowest sum are born first.
    """
    order = sorted(zip(*np.nonzero(active), strict=True), key=lambda t: (magnitude[t], t))
    small, dead, fresh = set(order[:count]), set(), set()
    for i, j in order:
        if len(dead) == count // 2 * 2:
            break
        if (i, j) in dead:
            continue
        able = []
        for p, q in order:
            grown = {(i, q), (p, j)}
            if p != i and q != j and (p, q) not in dead and not grown & fresh and (
                    not any(active[t] for t in grown)):
                outside = (p, q) not in small
                gain = 0.0 if outside else births[i, q] + births[p, j]
                able.append((outside, gain, magnitude[p, q], (p, q)))
        if able:
            *_, (p, q) = min(able)
            dead |= {(i, j), (p, q)}
            fresh |= {(i, q), (p, j)}
    after = active.copy()
    for t in dead:
        after[t] = False
    for t in fresh:
        after[t] = True
    return after
