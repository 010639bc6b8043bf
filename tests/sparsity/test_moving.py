"""Invariant 4: a move keeps the number of active weights in every slice. State moves to its new
place, born weights are zero, and the random stream is the stored one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from no_waits import NoWaits, as_kernel

from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.mask import pack, unpack
from megatron_spdf.random_streams import random_words
from megatron_spdf.sparsity import largest
from megatron_spdf.sparsity.algorithms.base import Moment, Move, MoveCost, MovingMasks
from megatron_spdf.sparsity.algorithms.gmp import Gmp
from megatron_spdf.sparsity.algorithms.rigl import Rigl
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.algorithms.static import Static
from megatron_spdf.sparsity.largest import smallest_at_rank
from megatron_spdf.sparsity.mask_slice import MaskSlice
from megatron_spdf.sparsity.moving import Carrier, born, kept_entries, moved_masks
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import slice_of

NAME = "decoder.layers.0.mlp.linear_fc1.weight"
WHEN = Moment(update=1, step=10, steps=100)


class Largest(MovingMasks):
    """The smallest active entries die, those with the largest gradient are born."""

    name = "largest"
    needs = "dense_gradient"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        count = self.count(len(part.active), when)
        return Move(part.lowest(part.values.abs(), part.active, count),
                    part.lowest(-part.gradient[part.inactive].abs(), part.inactive, count))


class Random(MovingMasks):
    name = "random"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        assert part.values is None and part.gradient is None
        count = self.count(len(part.active), when)
        return Move(part.random("die", part.active, count),
                    part.random("be born", part.inactive, count))


def packed(weight: SparseWeight) -> torch.Tensor:
    masks = [weight.draw(3, c) for c in range(weight.slices)]
    return torch.from_numpy(np.packbits(masks, axis=1))


def dense(weight: SparseWeight, bits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(slices, entries)."""
    whole = torch.zeros(weight.slices, weight.numel // weight.slices)
    whole[unpack(bits, whole.shape[1])] = values.flatten()
    return whole


@pytest.fixture(params=[0, 1], ids=["rows", "columns"])
def weight(request) -> SparseWeight:
    return SparseWeight(NAME, (12, 20), request.param, 4, 0.75)


def test_words_are_those_of_splitmix64():
    # the published outputs for this seed
    other, words = random_words([2**64 - 1, 1234567], 3, "cpu")
    assert [word % 2**64 for word in words.tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [word % 2**64 for word in other.tolist()] == [
        16490336266968443936, 16834447057089888969, 4048727598324417001]


@pytest.mark.parametrize("entries", [1, 8, 9, 60])
def test_bits_are_numpys(entries):
    masks = np.random.default_rng(0).random((3, entries)) < 0.5
    bits = pack(torch.from_numpy(masks))
    assert np.array_equal(bits.numpy(), np.packbits(masks, axis=1))
    assert np.array_equal(unpack(bits, entries).numpy(), masks)


def test_a_move_keeps_k_and_every_kept_value_at_its_place(weight):
    bits, k = packed(weight), weight.active_per_slice
    values = torch.arange(1.0, weight.active + 1).view(weight.slices, k)
    moved = moved_masks(Random(fraction=0.3), WHEN, weight, 3, 0, bits, values, None)
    before, after = unpack(bits, 60), unpack(moved, 60)
    count = round(0.3 * k)
    assert (after.sum(1) == k).all() and ((before & ~after).sum(1) == count).all()
    assert born(bits, moved) == count * weight.slices
    there = dense(weight, moved, Carrier(bits, moved, 60, k)(values))
    assert torch.equal(there, dense(weight, bits, values) * after)


def test_both_masks_are_indexed_once_for_all_states(weight, monkeypatch):
    bits, k = packed(weight), weight.active_per_slice
    moved = moved_masks(Random(fraction=0.3), WHEN, weight, 3, 0, bits, torch.rand(4, k), None)
    indexed, make_index = [], dispatch.make_index
    monkeypatch.setattr(dispatch, "make_index", lambda bits, *place: (
        indexed.append(bits), make_index(bits, *place))[1])
    carry = Carrier(bits, moved, 60, k)
    for values in torch.rand(3, weight.slices, k):
        expected = dense(weight, bits, values) * unpack(moved, 60)
        assert torch.equal(dense(weight, moved, carry(values)), expected)
    assert len(indexed) == 2


class Seen(MovingMasks):
    """Notes the slices that it is shown. The smallest die; none are born where it holds them."""

    name = "seen"
    parts: ClassVar[list[MaskSlice]] = []

    def select(self, part: MaskSlice, when: Moment) -> Move:
        assert when is WHEN
        self.parts.append(replace(part, mask=part.mask.clone()))
        born = part.inactive[:0] if self.holds else part.inactive[:2]
        return Move(part.lowest(part.values.abs(), part.active, 2), born)


class SeenHeld(Seen):
    needs = "values"
    holds = True


class SeenMoving(Seen):
    needs = "dense_gradient"


@pytest.mark.parametrize("kind", [SeenHeld, SeenMoving])
def test_an_algorithm_sees_each_slice_with_its_number_seed_and_values(weight, kind):
    bits, k = packed(weight), weight.active_per_slice
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(weight.slices, k, generator=draw)
    gradient = torch.randn(*weight.shape, generator=draw)
    kept = torch.rand(weight.slices, k, generator=draw) < 0.7
    kind.parts.clear()
    if kind.holds:
        left = kept_entries(kind(), WHEN, weight, 3, 8, bits, kept, values)
    else:
        left = moved_masks(kind(), WHEN, weight, 3, 8, bits, values, gradient)
    masks = unpack(bits, 60)
    for number, part in enumerate(kind.parts):
        alive = masks[number].clone()
        if kind.holds:
            alive[masks[number]] = kept[number]
            wanted = values[number][kept[number]]
            assert part.gradient is None and part.active_at(0.5) == weight.active_at(0.5)
        else:
            wanted = values[number]
            assert torch.equal(part.gradient, slice_of(gradient, weight, number))
        assert (part.name, part.number, part.seed, part.update) == (NAME, 8 + number, 3, 1)
        assert torch.equal(part.mask, alive)
        assert torch.equal(part.values.abs(), wanted.abs())
        died = alive.nonzero().view(-1)[wanted.abs().argsort(stable=True)[:2]]
        alive[died] = False
        if kind.holds:
            assert torch.equal(left[number], alive[masks[number]])
        else:
            alive[(~masks[number]).nonzero().view(-1)[:2]] = True
            assert torch.equal(unpack(left, 60)[number], alive)
    assert len(kind.parts) == weight.slices


def test_gradual_pruning_keeps_the_largest_of_a_dense_weight(weight):
    """Held to NumPy's sort of what has not died before, through several prunings."""
    planned = replace(weight, reached=0.0, algorithm=Gmp())  # stored dense
    values = torch.randn(weight.slices, 60, generator=torch.Generator().manual_seed(0))
    bits, kept = torch.full((weight.slices, 8), 255, dtype=torch.uint8), None
    alive = np.ones((weight.slices, 60), bool)
    for step in (30, 40, 55, 75):
        when = Moment(1, step, 100)
        kept = kept_entries(Gmp(every=5), when, planned, 3, 0, bits, kept, values)
        share = 1.0 - (1.0 - (step - 25) / 50) ** 3
        for mask, row in zip(alive, values.abs().numpy(), strict=True):
            left = round((1.0 - 0.75 * share) * 60)
            mask[np.argsort(np.where(mask, -row, np.inf), kind="stable")[left:]] = False
        assert np.array_equal(kept.numpy(), alive)
        values = values * kept
    assert (alive.sum(1) == 15).all()


class SetBySlice(Set):
    name = "set by slice"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        return super().select(part, when)


class RiglBySlice(Rigl):
    name = "rigl by slice"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        return super().select(part, when)


class GmpBySlice(Gmp):
    name = "gmp by slice"

    def select(self, part: MaskSlice, when: Moment) -> Move:
        return super().select(part, when)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels are stood in for, which the host need not wait for."""
    def lowest_bits(scores: torch.Tensor, count: int) -> torch.Tensor:
        order = (scores + 0).argsort(dim=1, stable=True)[:, :count]
        return pack(torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True))

    kernels = SimpleNamespace(lowest_bits=as_kernel(lowest_bits))
    monkeypatch.setattr(largest, "lowest_kernels", lambda scores: kernels)
    for name in ("make_index", "expand", "compress"):
        monkeypatch.setattr(dispatch, name, as_kernel(getattr(dispatch, name)))


@pytest.mark.parametrize(("together", "by_slice"), [(Set, SetBySlice), (Rigl, RiglBySlice)])
@pytest.mark.parametrize("ties", [False, True])
def test_slices_move_together_as_one_by_one_and_nobody_waits(weight, together, by_slice, ties,
                                                             as_on_a_gpu):
    bits, k = packed(weight), weight.active_per_slice
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(weight.slices, k, generator=draw)
    gradient = torch.randn(*weight.shape, generator=draw)
    if ties:
        values, gradient = (2 * values).round(), gradient.round()
    assert together().together and not by_slice().together
    arguments = WHEN, weight, 3, 8, bits, values, gradient
    one_by_one = moved_masks(by_slice(), *arguments)
    with NoWaits():
        moved = moved_masks(together(), *arguments)
        carried, number = Carrier(bits, moved, 60, k)(values), born(bits, moved)
    assert torch.equal(moved, one_by_one)
    assert int(number) == weight.slices * together().count(k, WHEN) > 0
    expected = dense(weight, bits, values) * unpack(moved, 60)
    assert torch.equal(dense(weight, moved, carried), expected)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("algorithm", [Set(), Rigl()], ids=["set", "rigl"])
def test_a_move_of_many_slices_launches_as_much_as_one_of_few(algorithm, axis, as_on_a_gpu):
    """But for views, which launch nothing."""
    launched = []
    for slices in (2, 32):
        shape = (16 * slices, 20) if axis == 0 else (20, 16 * slices)
        weight = SparseWeight(NAME, shape, axis, slices, 0.75)
        values = torch.randn(slices, weight.active_per_slice)
        with NoWaits() as counted:
            moved_masks(algorithm, WHEN, weight, 3, 0, packed(weight), values,
                        torch.randn(*weight.shape))
        launched.append({name: count for name, count in counted.calls.items()
                         if name not in ("view", "slice", "select", "alias", "detach")})
    assert launched[0] == launched[1] and sum(launched[0].values()) < 50


@pytest.mark.parametrize("ties", [False, True])
def test_slices_are_pruned_together_as_one_by_one_and_nobody_waits(weight, ties, as_on_a_gpu):
    """Also where what is alive is zero, as what is held is, and where fewer are alive than may
    stay."""
    planned = replace(weight, reached=0.0, algorithm=Gmp())  # stored dense
    values = torch.randn(weight.slices, 60, generator=torch.Generator().manual_seed(0))
    if ties:
        values = values.round()
    bits, kept, seen = torch.full((weight.slices, 8), 255, dtype=torch.uint8), None, []
    for step in (40, 30, 55, 75):
        arguments = Moment(1, step, 100), planned, 3, 0, bits, kept, values
        one_by_one = kept_entries(GmpBySlice(every=5), *arguments)
        with NoWaits():
            kept = kept_entries(Gmp(every=5), *arguments)
        assert torch.equal(kept, one_by_one)
        seen.append(int(kept.sum()))
        values = values * kept
    assert seen[0] == seen[1] > seen[2] > seen[3]


def test_a_move_is_the_same_however_slices_are_shared_out(weight):
    bits, values = packed(weight), torch.zeros(weight.slices, weight.active_per_slice)
    whole = moved_masks(Random(), WHEN, weight, 3, 0, bits, values, None)
    halves = [moved_masks(Random(), WHEN, weight, 3, first, bits[first : first + 2],
                          values[first : first + 2], None) for first in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("other", [{"seed": 4}, {"when": Moment(2, 10, 100)}, {"first": 1}])
def test_seed_update_and_slice_give_other_moves(other):
    weight = SparseWeight(NAME, (12, 20), 0, 1, 0.75)
    bits, values = packed(weight), torch.zeros(1, weight.active)
    arguments = {"when": WHEN, "seed": 3, "first": 0}
    one, two = (moved_masks(Random(), a["when"], weight, a["seed"], a["first"], bits, values, None)
                for a in (arguments, arguments | other))
    assert not torch.equal(one, two)


def test_values_and_gradient_are_those_of_the_slice(weight):
    bits = packed(weight)
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(weight.slices, weight.active_per_slice, generator=draw)
    gradient = torch.randn(*weight.shape, generator=draw)
    moved = moved_masks(Largest(fraction=0.2), WHEN, weight, 3, 0, bits, values, gradient)
    for c in range(weight.slices):
        mask, count = unpack(bits, 60)[c].numpy(), round(0.2 * weight.active_per_slice)
        magnitudes = np.zeros(60)
        magnitudes[mask] = values[c].abs().numpy()
        died = sorted(np.flatnonzero(mask), key=lambda i, m=magnitudes: m[i])[:count]
        scores = slice_of(gradient, weight, c).abs().numpy()
        born = sorted(np.flatnonzero(~mask), key=lambda i, s=scores: -s[i])[:count]
        mask[died], mask[born] = False, True
        assert np.array_equal(unpack(moved, 60)[c].numpy(), mask)


def test_ties_go_by_position():
    part = MaskSlice(NAME, 0, torch.ones(5, dtype=torch.bool), None, None, 0, 1)
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0])
    assert part.lowest(scores, part.active, 3).tolist() == [2, 1, 3]
    assert part.lowest(scores, part.active, 0).tolist() == []


def test_every_candidate_is_drawn_equally_often():
    mask, drawn = torch.arange(40) < 30, torch.zeros(40)
    for update in range(2000):
        part = MaskSlice(NAME, 0, mask, None, None, 0, update)
        drawn[part.random("die", part.active, 3)] += 1
    # 200 each, with a standard deviation of 13.4
    assert (drawn[:30] - 200).abs().max() < 5 * 13.4 and not drawn[30:].any()


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}, {"update": 2}, {"name": "w"},
                                   {"purpose": "be born"}], ids=str)
def test_each_part_of_the_key_gives_other_draws(other):
    """Dying and being born also where an algorithm draws both from the same candidates."""
    mask = torch.ones(200, dtype=torch.bool)

    def drawn(purpose: str = "die", **changes) -> set[int]:
        place = {"name": NAME, "number": 0, "seed": 0, "update": 1, **changes}
        part = MaskSlice(mask=mask, values=None, gradient=None, **place)
        return set(part.random(purpose, part.active, 20).tolist())

    assert drawn() == drawn() and len(drawn()) == 20
    assert len(drawn() & drawn(**other)) < 10  # by chance 2


@pytest.mark.parametrize("kind", [Static, Random, Largest])
def test_the_cost_of_a_move_is_that_of_the_dense_gradient(kind):
    """fp32, held and summed up whole; its products at the inactive entries, 2 FLOPs each."""
    found = kind().cost(entries=1000, active=100)
    wanted = (4000, 4000, 2 * 900) if kind is Largest else (0, 0, 0)
    assert (found.transient, found.reduced, found.flops) == wanted


def test_the_last_micro_batch_alone_is_held_as_it_is():
    """In training precision, and without the others' products."""
    found = Rigl(gradient="micro_batch").cost(1000, 100, width=2, micro_batches=4)
    assert (found.transient, found.reduced, found.flops) == (2000, 4000, 450)
    assert Rigl().cost(1000, 100, width=2, micro_batches=4) == MoveCost(4000, 4000, 1800)


def test_nothing_moves_with_fraction_zero(weight):
    bits, values = packed(weight), torch.ones(weight.slices, weight.active_per_slice)
    moved = moved_masks(Random(fraction=0.0), WHEN, weight, 3, 0, bits, values, None)
    assert torch.equal(moved, bits)


@pytest.mark.parametrize("born", [[0], [], [1, 2]], ids=["active", "too few", "too many"])
def test_a_move_that_breaks_the_rules_is_caught(born):
    class Wrong(Random):
        def select(self, part, when):
            return Move(part.active[1:2], torch.cat([part.active, part.inactive])[
                torch.tensor([i and i + len(part.active) for i in born], dtype=torch.int64)])

    weight = SparseWeight(NAME, (12, 20), 0, 4, 0.75)
    with pytest.raises(AssertionError, match=r"random moves slice 0 of decoder\.layers\.0"):
        moved_masks(Wrong(), WHEN, weight, 3, 0, packed(weight),
                    torch.ones(4, weight.active_per_slice), None)


def test_masks_are_due_from_start_on_and_before_stop():
    due = [step for step in range(1, 41) if Random(every=5, start=0.25, stop=0.75).due(step, 40)]
    assert due == [10, 15, 20, 25]
    assert Random(every=5, start=0.25, stop=0.75).moves(40) == 4
    assert [step for step in range(1, 8) if Random(every=2, stop=1.0).due(step, 6)] == [2, 4]
    assert not any(Static().due(step, 40) for step in range(1, 41))


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_gpu_selects_as_a_cpu_does(count, dtype):
    scores = torch.randint(-40, 40, (100,), generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = scores.sort().values[count - 1]
    for selects_alone in (True, False):
        assert smallest_at_rank(scores, count, selects_alone) == expected
