"""How zeros are distributed over the weights that no rule of the recipe matches.

`uniform`: the same level for each. `erk` (Erdos-Renyi kernel; Mocanu et al. 2018, Evci et al.
2020): the density of a matrix (out, in) is proportional to (out + in) / (out in), for as many
active entries in all as `uniform` has. Matrices that it would give more than they have become
dense, and the others share what is left. Q, K and V, and the gate and the up projection, are
matrices of their own here, although one weight holds them: else the result would depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_spdf.architecture.base import Weight


def erk_densities(weights: Sequence[Weight], density: float) -> list[float]:
    """Densities of linear weights by ERK.

    Args:
        weights: of which each is a matrix, or several that lie one after another in its rows.
        density: of all of them together, over 0.
    """
    matrices = [(number, rows, w.shape[1]) for number, w in enumerate(weights)
                for rows in w.matrices or w.shape[:1]]
    raw = [(rows + columns) / (rows * columns) for _, rows, columns in matrices]
    sizes = [rows * columns for _, rows, columns in matrices]
    budget, dense = density * sum(sizes), [False] * len(raw)
    while True:
        left = budget - sum(n for n, full in zip(sizes, dense, strict=True) if full)
        wanted = sum(r * n for r, n, full in zip(raw, sizes, dense, strict=True) if not full)
        epsilon = left / wanted if wanted else 0.0
        largest = max((r for r, full in zip(raw, dense, strict=True) if not full), default=0.0)
        if epsilon * largest <= 1.0:
            break
        dense = [full or r == largest for r, full in zip(raw, dense, strict=True)]
    active = [0.0] * len(weights)
    for (number, _, _), r, n, full in zip(matrices, raw, sizes, dense, strict=True):
        active[number] += n if full else epsilon * r * n
    return [a / w.numel for a, w in zip(active, weights, strict=True)]


def whole_entries(densities: Sequence[float], entries: Sequence[int], slices: Sequence[int],
                  budget: int) -> list[int]:
    """Active entries of a slice of each weight, in whole numbers: those of the densities rounded
    down, and then one more in the order of the remainders while the budget allows it.

    Args:
        densities: of the weights.
        entries: of a slice of each.
        slices: of each.
        budget: active entries of all weights together, which is met to less than the slices of one.
    """
    exact = [d * n for d, n in zip(densities, entries, strict=True)]
    active = [min(n, max(1, int(e))) for e, n in zip(exact, entries, strict=True)]
    left = budget - sum(k * c for k, c in zip(active, slices, strict=True))
    for i in sorted(range(len(active)), key=lambda i: (active[i] - exact[i], i)):
        if slices[i] <= left and active[i] < entries[i]:
            active[i], left = active[i] + 1, left - slices[i]
    return active
