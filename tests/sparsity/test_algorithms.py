"""Mask algorithms choose what their papers say, slice by slice, against NumPy on dense weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_spdf.sparsity.algorithms.acdc import AcDc
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS, Moment, Move, Part
from megatron_spdf.sparsity.algorithms.gmp import Gmp
from megatron_spdf.sparsity.algorithms.rigl import Rigl
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.mask_slice import MaskSlice

N, K = 400, 100
FIRST = Moment(update=1, step=100, steps=100_000)  # the fraction has hardly begun to fall


def part(values: np.ndarray, gradient: np.ndarray | None = None, number: int = 0, update: int = 1,
         seed: int = 3) -> MaskSlice:
    """A slice of which every fourth entry is active."""
    mask = torch.zeros(N, dtype=torch.bool)
    mask[::4] = True
    return MaskSlice("w", number, mask, torch.from_numpy(values),
                     None if gradient is None else torch.from_numpy(gradient), seed, update)


def sets(move: Move) -> tuple[set[int], set[int]]:
    return set(move.died.tolist()), set(move.born.tolist())


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(1).normal(size=K).astype(np.float32)


@pytest.mark.parametrize("algorithm", [Set(), Rigl()])
def test_the_smallest_magnitudes_die_whatever_their_sign(algorithm, values):
    dense = np.full(N, np.inf)
    dense[::4] = np.abs(values)
    expected = set(np.argsort(dense, kind="stable")[:30].tolist())
    died, born = sets(algorithm.select(part(values, np.ones(N, np.float32)), FIRST))
    assert died == expected and len(born) == 30
    assert not born & set(range(0, N, 4))


@pytest.mark.parametrize("algorithm", [Set(), Rigl()])
def test_ties_die_by_position(algorithm):
    zeros = np.zeros(K, np.float32)
    died, _ = sets(algorithm.select(part(zeros, np.ones(N, np.float32)), FIRST))
    assert died == set(range(0, 4 * 30, 4))


def test_rigl_grows_the_largest_gradients_that_are_not_active(values):
    gradient = np.random.default_rng(2).normal(size=N).astype(np.float32)
    gradient[::4] *= 1e6  # of active entries: they do not count
    score = np.abs(gradient)
    score[::4] = -np.inf
    _, born = sets(Rigl().select(part(values, gradient), FIRST))
    assert born == set(np.argsort(-score, kind="stable")[:30].tolist())


def test_rigl_grows_as_many_where_gradients_are_zero(values):
    """Rows of dead units have none; published code lets density fall there."""
    _, born = sets(Rigl().select(part(values, np.zeros(N, np.float32)), FIRST))
    assert born == {i for i in range(40) if i % 4}


def test_set_draws_anew_for_every_slice_move_and_seed(values):
    drawn = [sets(Set().select(part(values, **key), FIRST))[1]
             for key in ({}, {"number": 1}, {"update": 2}, {"seed": 4})]
    assert sets(Set().select(part(values), FIRST))[1] == drawn[0]
    for i, one in enumerate(drawn):
        for other in drawn[i + 1:]:
            assert len(one & other) < 10  # 30 of 300 each: 3 by chance


@pytest.mark.slow
def test_set_draws_every_inactive_entry_alike(values):
    """A chi-squared test over 2,000 moves."""
    counts = np.zeros(N)
    for update in range(1, 2001):
        for entry in sets(Set().select(part(values, update=update), FIRST))[1]:
            counts[entry] += 1
    found = counts[np.arange(N) % 4 > 0]
    assert found.sum() == 2000 * 30 and counts[::4].sum() == 0
    statistic = ((found - 200) ** 2 / (200 * 0.9)).sum()  # 299 degrees of freedom
    assert abs(statistic - 299) < 5 * math.sqrt(2 * 299)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_the_fraction_falls_as_a_cosine_from_start_to_stop(name):
    """alpha / 2 (1 + cos(pi t / T)), and t counts from the first move."""
    algorithm = ALGORITHMS.get(name)(fraction=0.4, start=0.2, stop=0.8)
    at = [algorithm.count(1000, Moment(1, step, 1000)) for step in (200, 350, 500, 650, 799)]
    assert at == [400, 341, 200, 59, 0]
    constant = ALGORITHMS.get(name)(fraction=0.4, start=0.2, stop=0.8, anneal="constant")
    assert {constant.count(1000, Moment(1, step, 1000)) for step in (200, 500, 799)} == {400}


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_defaults_are_the_published_ones(name):
    assert ALGORITHMS.get(name)().model_dump() == {
        "every": 100, "fraction": 0.3, "start": 0.0, "stop": 0.75, "anneal": "cosine",
        "track_ages": False, "newborn": "auto", "ramp": 100,
        **({"gradient": "step"} if name == "rigl" else {})}


def test_gmp_follows_the_cubic_and_is_at_the_level_at_its_end():
    """s(t) = s (1 - (1 - t)^3) (Zhu and Gupta 2017): 0, 7/8 half-way, 1."""
    algorithm = Gmp()  # a quarter dense, pruning for half of the steps
    assert [algorithm.share(step, 4000) for step in (1, 1000, 2000, 3000, 4000)] == [
        0.0, 0.0, 0.875, 1.0, 1.0]
    due = [step for step in range(1, 4001) if algorithm.due(step, 4000)]
    assert due == list(range(1100, 3001, 100))
    mean = sum(1.0 - 0.75 * algorithm.share(step, 20_000) for step in range(1, 20_001)) / 20_000
    assert mean == pytest.approx(17 / 32, abs=1e-4)  # the average density of its recipe at 75%


@pytest.mark.parametrize("steps", [57, 60, 999, 1000, 12_345])
@pytest.mark.parametrize("stores", [1, 2, 3, 7])
def test_gmps_parts_end_where_it_prunes(steps, stores):
    algorithm = Gmp(every=5, stores=stores)
    parts = algorithm.parts(steps)
    assert [p.reached for p in parts] == sorted(p.reached for p in parts)
    assert (parts[0].reached, parts[-1].last) == (0.0, steps)
    assert len(parts) == stores + 1 or steps < 100 and len(parts) <= stores
    for before, part in zip(parts, parts[1:], strict=False):
        assert algorithm.due(before.last, steps)
        assert part.reached == algorithm.share(before.last, steps) > before.reached
    assert stores == 1 or parts[-1].reached == 1.0
    # nothing is due while weights are stored dense
    assert not any(algorithm.due(step, steps) for step in range(1, parts[0].last))


@pytest.mark.parametrize("steps", [57, 999, 1000, 12_345])
@pytest.mark.parametrize("keys", [{}, {"start": 0.1, "stop": 0.6}, {"start": 0.0, "stop": 1.0}])
def test_gmp_prunes_between_the_steps_that_are_nearest_to_its_shares(steps, keys):
    algorithm = Gmp(every=7, **keys)
    first, last = (min(range(steps + 1), key=lambda step, share=share: abs(step - share * steps))
                   for share in (algorithm.start, algorithm.stop))
    assert [step for step in range(1, steps + 1) if algorithm.due(step, steps)] == sorted(
        {*(step for step in range(7, last, 7) if step > first), last})
    assert [algorithm.share(step, steps) for step in range(1, steps + 1)] == pytest.approx(
        [1.0 - (1.0 - np.clip((step - first) / (last - first), 0.0, 1.0)) ** 3
         for step in range(1, steps + 1)])


@pytest.mark.parametrize("stores", [1, 2, 4])
def test_gmp_may_begin_at_a_share_of_its_level(stores):
    """s(t) = s + (s_i - s) (1 - t)^3 (Zhu and Gupta 2017, equation 1), here with s_i = 0.6 s;
    weights are stored at s_i from the first step on."""
    algorithm = Gmp(initial=0.6, stores=stores)
    assert [algorithm.share(step, 4000) for step in (1, 1000, 2000, 3000, 4000)] == [
        0.6, 0.6, 1.0 - 0.4 / 8, 1.0, 1.0]
    parts = algorithm.parts(4000)
    assert [part.reached for part in parts] == pytest.approx(
        [0.6, *(0.6 + 0.4 * n / (stores - 1) for n in range(1, stores))], abs=0.06)
    assert parts[-1].last == 4000 and stores == len(parts)
    assert stores == 1 or parts[-1].reached == 1.0


@pytest.mark.parametrize(("start", "stop", "dense", "sparse"), [
    (0.5, 0.52, 5, 6), (0.0, 0.01, 0, 1), (0.97, 1.0, 9, 10)])
def test_gmp_prunes_at_once_where_its_steps_are_none(start, stop, dense, sparse):
    """Of ten steps, `start` and `stop` fall on one."""
    algorithm = Gmp(start=start, stop=stop)
    assert (algorithm.share(dense, 10), algorithm.share(sparse, 10)) == (0.0, 1.0)
    assert [step for step in range(1, 11) if algorithm.due(step, 10)] == [sparse]


def test_gmp_kills_the_smallest_up_to_the_cubic(values):
    one = part(values)
    one = MaskSlice(one.name, 0, one.mask, one.values, None, 3, 1,
                    lambda share: max(1, round((1.0 - 0.9 * share) * N)))
    when = Moment(1, 45_000, 100_000)
    move = Gmp().select(one, when)  # t = 0.4, s = 0.784 of 0.9: 118 of 400 may stay, and 100 do
    assert not len(move.died) and not len(move.born)
    move = Gmp().select(one, Moment(1, 75_000, 100_000))
    assert set(move.died.tolist()) == {4 * i for i in np.argsort(np.abs(values))[:60].tolist()}


def test_acdcs_parts_are_those_of_the_paper():
    """Of 100 epochs; pruned after 10, 20, ... 70 and 85, dense again after 15, 25, ... 75."""
    ends = [*range(10, 80, 5), 85, 100]
    assert AcDc().parts(100) == [Part(end, float(number % 2)) for number, end in enumerate(ends)]
    dense = sum(1 - AcDc().share(step, 100) for step in range(1, 101))
    assert dense == 50


@pytest.mark.parametrize("steps", [57, 1236, 12_344])
def test_acdcs_parts_end_at_the_steps_that_are_nearest_to_their_shares(steps):
    ends = [min(range(steps + 1), key=lambda step, share=share: abs(step - share / 100 * steps))
            for share in (*range(10, 80, 5), 85, 100)]
    assert AcDc().parts(steps) == [Part(end, float(n % 2)) for n, end in enumerate(ends)]


@pytest.mark.parametrize("keys", [{"turn": 0.2}, {"turn": 0.3, "last_dense": 0.7},
                                  {"start": 0.0, "turn": 0.25}, {"turn": 0.5}])
def test_acdc_ends_sparse_whatever_its_keys(keys):
    parts = AcDc(**keys).parts(1000)
    assert parts[-1] == Part(1000, 1.0) and parts[-2] == Part(850, 0.0)
    assert all(a.last < b.last and a.reached != b.reached
               for a, b in zip(parts, parts[1:], strict=False))
