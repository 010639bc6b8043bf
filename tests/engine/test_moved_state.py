"""Moves of masks and held entries on one rank of several, against dense weights; what ranks say to
each other is stood in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_spdf.engine import moving
from megatron_spdf.kernels.mask import unpack
from megatron_spdf.layers.compact import CompactWeight, compact_of, make_compact
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.sparsity.algorithms.base import Moment
from megatron_spdf.sparsity.algorithms.gmp import Gmp
from megatron_spdf.sparsity.algorithms.rigl import Rigl
from megatron_spdf.sparsity.algorithms.set import Set
from megatron_spdf.sparsity.plan import Plan, SparseWeight

SEED, WORLD, RANK = 3, 2, 1
WHEN = Moment(update=2, step=40, steps=100)
NAMES = (MASTER, "exp_avg")
# of 2 tensor-parallel ranks: each has two slices of four, by rows and by columns
SHAPES = {"a": ((16, 12), 0), "b": ((12, 16), 1)}


class State:
    """Masters and a moment of every parameter, whole; the parameters are rounded to bf16."""

    names = NAMES

    def __init__(self, models: list[nn.Module]):
        draw = torch.Generator().manual_seed(0)
        self.parameters = [p for model in models for p in model.parameters()]
        self.states = {(p, name): torch.randn(p.shape, generator=draw) for name in NAMES
                       for p in self.parameters}
        self.settled = 0
        self.settle()

    def whole(self, name: str):
        for parameter in self.parameters:
            yield parameter, self.states[parameter, name]

    def put(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        self.states[parameter, name] = value.clone().view(parameter.shape)

    def settle(self) -> None:
        self.settled += 1
        for parameter in self.parameters:
            parameter.data.copy_(self.states[parameter, MASTER].bfloat16())


@pytest.fixture
def engine(monkeypatch):
    """An engine on the second of two tensor-parallel ranks, with two replicas."""
    said = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(moving.ps, "get_tensor_model_parallel_rank", lambda: RANK)
    monkeypatch.setattr(moving.ps, "get_data_parallel_group", lambda with_context_parallel: said)
    # both ranks of a group have alike
    monkeypatch.setattr(moving.dist, "all_reduce", lambda tensor, group=None: tensor.mul_(2))

    def make(algorithm, reached: float = 1.0, replica: int = 0):
        plan = {name: SparseWeight(name, shape, axis, 4, 0.75, reached=reached, algorithm=algorithm)
                for name, (shape, axis) in SHAPES.items()}
        models = []
        for weight in plan.values():
            layer = nn.Linear(*reversed(CompactWeight(weight, SEED, RANK, WORLD, "cpu").shape))
            make_compact(layer, CompactWeight(weight, SEED, RANK, WORLD, "cpu"))
            models.append(nn.Sequential(layer))
        return SimpleNamespace(models=models, state=State(models), plan=Plan(SEED, plan),
                               data_parallel_rank=replica)
    return make


def compacts(engine) -> dict[str, tuple[nn.Parameter, CompactWeight]]:
    layers = [model[0] for model in engine.models]
    return {compact_of(layer).planned.name: (layer.parametrizations.weight.original,
                                             compact_of(layer)) for layer in layers}


def dense(engine) -> dict[str, dict[str, Tensor]]:
    """Weight -> its masks (slices, entries), and its states there, zero elsewhere."""
    found = {}
    for name, (parameter, compact) in compacts(engine).items():
        mask = unpack(compact.mask_bits, compact.mask.entries)
        found[name] = {"mask": mask}
        for state in NAMES:
            found[name][state] = torch.zeros(mask.shape)
            found[name][state][mask] = engine.state.states[parameter, state].flatten()
    return found


class Watched:
    """Notes what the algorithm is shown."""

    def select(self, part, when):
        seen.append(part)
        return super().select(part, when)


class WatchedSet(Watched, Set):
    pass


class WatchedRigl(Watched, Rigl):
    pass


seen: list = []


@pytest.mark.parametrize("kind", [WatchedSet, WatchedRigl])
@pytest.mark.parametrize("replica", [0, 1])
def test_what_stays_keeps_its_state_and_what_is_born_has_none(engine, kind, replica):
    algorithm = kind(every=1, fraction=0.4, anneal="constant", stop=1.0)
    there, draw = engine(algorithm, replica=replica), torch.Generator().manual_seed(1)
    biases = {p: there.state.states[p, name].clone() for p in there.state.parameters
              for name in NAMES if p.ndim == 1}
    mean = {}
    for name, (_, compact) in compacts(there).items():
        mean[name] = torch.randn(compact.shape, generator=draw)
        compact.collector = SimpleNamespace(gradient=mean[name].clone())
    before = dense(there)
    seen.clear()
    settled = there.state.settled
    counts = moving.move_masks(there, algorithm, WHEN)
    assert there.state.settled == settled + 1
    for name, after in dense(there).items():
        old = before[name]
        moved = round(0.4 * 12)
        assert (after["mask"].sum(1) == 12).all()
        assert ((after["mask"] & ~old["mask"]).sum(1) == moved).all()
        for state in NAMES:
            assert torch.equal(after[state], old[state] * after["mask"])
        # 2 slices on each of 2 ranks; of the second replica nothing is counted
        assert counts[name].moved == (2 * 2 * moved if replica == 0 else 0)
        assert counts[name].active == (2 * 2 * 12 if replica == 0 else 0)
        parameter, compact = compacts(there)[name]
        assert torch.equal(parameter, there.state.states[parameter, MASTER].bfloat16().float())
        expanded = torch.stack([part.reshape(-1) for part in compact(parameter).chunk(
            2, compact.planned.axis)])
        assert torch.equal(expanded, after[MASTER].bfloat16().float())
        parts = [part for part in seen if part.name == name]
        assert [part.number for part in parts] == [2, 3]  # of the second rank
        assert {(part.seed, part.update) for part in parts} == {(SEED, 2)}
        if kind is WatchedRigl:  # the mean over replicas, which had the same
            axis = compact.planned.axis
            for part, whole in zip(parts, mean[name].chunk(2, axis), strict=True):
                assert torch.allclose(part.gradient, whole.reshape(-1))
    assert all(torch.equal(there.state.states[p, NAMES[-1]], value) for p, value in biases.items())


def test_gradients_that_replicas_disagree_on_let_nothing_be_born(engine, monkeypatch):
    """Summed with their sign, and ranked by magnitude after that: of two dead entries the one with
    5 here and -5 there stays dead, and the one with 1 on both is born, alone or first of all."""
    algorithm = Rigl(every=1, fraction=1 / 12, anneal="constant", stop=1.0)
    there, of_others = engine(algorithm), {}
    places = {}
    for name, (parameter, compact) in compacts(there).items():
        dead = (compact.expand(torch.ones_like(parameter), compact.mask) == 0).nonzero()
        torn, agreed = dead[0].tolist(), dead[1].tolist()
        here, other = 1e-3 * torch.ones(compact.shape), 1e-3 * torch.ones(compact.shape)
        here[*torn], other[*torn], here[*agreed], other[*agreed] = 5.0, -5.0, 1.0, 1.0
        compact.collector, of_others[compact.shape] = SimpleNamespace(gradient=here), other
        places[name] = torn, agreed
    assert len(of_others) == len(places) == 2
    monkeypatch.setattr(moving.dist, "all_reduce", lambda tensor, group=None: tensor.add_(
        of_others.get(tuple(tensor.shape), tensor)))
    moving.move_masks(there, algorithm, WHEN)
    for name, (parameter, compact) in compacts(there).items():
        active = compact.expand(torch.ones_like(parameter), compact.mask) != 0
        assert [bool(active[*place]) for place in places[name]] == [False, True]


def test_where_nothing_moves_nothing_is_touched(engine):
    algorithm = Set(every=1, fraction=0.0, anneal="constant", stop=1.0)
    there = engine(algorithm)
    states, settled = dict(there.state.states), there.state.settled
    counts = moving.move_masks(there, algorithm, WHEN)
    assert {name: count.moved for name, count in counts.items()} == {"a": 0, "b": 0}
    assert there.state.settled == settled
    assert all(there.state.states[key] is value for key, value in states.items())


def test_what_is_held_is_zero_with_all_its_state_and_is_counted_once(engine):
    algorithm = Gmp(every=5)
    there = engine(algorithm, reached=0.0)
    before, last = dense(there), dict.fromkeys(SHAPES, 0)
    assert moving.count_held(there) == last
    for step in (40, 60, 75):
        died = moving.hold_entries(there, algorithm, Moment(1, step, 100))
        share = 1.0 - (1.0 - (step - 25) / 50) ** 3
        left = round((1.0 - 0.75 * share) * 48)
        for name, after in dense(there).items():
            kept = before[name][MASTER].abs().argsort(1, descending=True)[:, :left]
            mask = torch.zeros_like(before[name]["mask"]).scatter(1, kept, True)
            for state in NAMES:
                assert torch.equal(after[state], before[name][state] * mask)
            parameter, compact = compacts(there)[name]
            assert torch.equal(compact.kept, mask)
            assert torch.equal(parameter, there.state.states[parameter, MASTER].bfloat16().float())
            held = 2 * 2 * (48 - left)
            assert died[name].moved == held - last[name]
            last[name] = held
    assert moving.count_held(there) == last


def test_where_no_mask_changes_no_state_is_gathered(engine, monkeypatch):
    """As on a pipeline stage whose weights are all dense, or in a move that finds none."""
    there = engine(Set(every=1))
    masks = {name: bits["mask"] for name, bits in dense(there).items()}
    monkeypatch.setattr(moving, "_choose", lambda *_: {})
    monkeypatch.setattr(there.state, "whole", lambda name: pytest.fail(f"{name} was gathered"))
    settled = there.state.settled
    found = moving.move_masks(there, Set(every=1), WHEN)
    assert there.state.settled == settled and {c.moved for c in found.values()} == {0}
    assert all(torch.equal(bits["mask"], masks[name]) for name, bits in dense(there).items())
