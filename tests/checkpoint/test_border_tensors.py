"""What a rank reads at a border between stages, tensor by tensor, and what it reads on a resume,
against NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.border import _Across
from megatron_spdf.checkpoint.checkpointer import _fill, _tensors_of
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.sparsity.algorithms.top_kast import TopKast
from megatron_spdf.sparsity.plan import Plan, SparseWeight

PLAN = Plan(0, {"rows": SparseWeight("rows", (8, 6), 0, 4, 0.75),
                "columns": SparseWeight("columns", (6, 8), 1, 4, 0.75),
                "kept": SparseWeight("kept", (8, 6), 0, 4, 0.75, algorithm=TopKast())})
SHAPES = {"rows": (8, 6), "columns": (6, 8), "kept": (8, 6), "dense": (4, 6)}
RANK = (0, 1, 2)  # the second half of the first axis: of a sparse weight, its slices 2 and 3


def of_before(name: str, state: str) -> Tensor:
    """Weights and a moment of the stage before, whole."""
    draw = torch.Generator().manual_seed(len(name) + 100 * len(state))
    return torch.randn(SHAPES[name], generator=draw)


@pytest.fixture
def across():
    def make(fresh: bool) -> _Across:
        reader = SimpleNamespace(weights=SHAPES, state=of_before,
                                 entries=lambda *place: 2 * of_before(*place))
        return _Across(reader, PLAN, fresh)
    return make


def wanted(key: str, shape: tuple[int, int], dtype=torch.float32) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.empty(shape, dtype=dtype), RANK)


def slices(name: str, state: str) -> list[np.ndarray]:
    """Slices 2 and 3, flattened."""
    axis = PLAN.weights[name].axis
    return [part.numpy().reshape(-1) for part in of_before(name, state).chunk(4, axis)[2:]]


def largest(name: str) -> list[np.ndarray]:
    """Masks of the three largest masters of twelve in each of these slices."""
    masks = []
    for part in slices(name, MASTER):
        mask = np.zeros(12, bool)
        mask[np.argsort(-np.abs(part), kind="stable")[:3]] = True
        masks.append(mask)
    return masks


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_the_largest_masters_stay_with_all_their_state(across, name):
    states = {MASTER: f"optimizer.state.{MASTER}.{name}.values",
              "exp_avg": f"optimizer.state.exp_avg.{name}.values"}
    found = across(fresh=False).fill({
        "model": {"values": wanted(f"{name}.values", (2, 3), torch.bfloat16),
                  **{bits: wanted(f"{name}.{bits}", (2, 2), torch.uint8)
                     for bits in ("mask_bits", "first_bits", "held_bits")}},
        "ages": wanted(f"{name}.ages", (2, 3), torch.uint8),
        "state": {state: wanted(key, (2, 3)) for state, key in states.items()}})
    masks = largest(name)
    for bits in ("mask_bits", "first_bits"):
        assert np.array_equal(found["model"][bits].numpy(), np.packbits(masks, axis=1))
    for state in states:
        kept = np.stack([part[mask] for part, mask in zip(slices(name, state), masks, strict=True)])
        assert np.array_equal(found["state"][state].numpy(), kept)
    assert torch.equal(found["model"]["values"], found["state"][MASTER].bfloat16())
    for zeros in (found["model"]["held_bits"], found["ages"]):
        assert zeros.dtype == torch.uint8 and not zeros.any()


def test_weights_that_keep_their_entries_have_all_of_them(across):
    found = across(fresh=False).fill({
        "moment": wanted("optimizer.state.exp_avg.kept.values", (2, 12)),
        "trained": wanted("kept.trained_bits", (2, 2), torch.uint8)})
    assert np.array_equal(found["moment"].numpy(), 2 * np.stack(slices("kept", "exp_avg")))
    learn = []  # until masks are chosen anew: twice as many as the three that are active
    for part in slices("kept", MASTER):
        learn.append(np.zeros(12, bool))
        learn[-1][np.argsort(-np.abs(part), kind="stable")[:6]] = True
    assert np.array_equal(found["trained"].numpy(), np.packbits(learn, axis=1))


@pytest.mark.parametrize("fresh", [False, True])
def test_dense_weights_are_cut_and_a_new_optimizer_has_no_moments(across, fresh):
    found = across(fresh).fill({state: wanted(f"optimizer.state.{state}.dense", (2, 6))
                                for state in (MASTER, "exp_avg")})
    assert torch.equal(found[MASTER], of_before("dense", MASTER)[2:])
    moment = of_before("dense", "exp_avg")[2:]
    assert torch.equal(found["exp_avg"], torch.zeros(2, 6) if fresh else moment)


def files(shape=(4, 6), dtype=torch.float32) -> SimpleNamespace:
    whole = torch.arange(24.0).view(4, 6)

    def fill(key: str, offset: tuple[int, int], into: Tensor) -> None:
        (top, left), (rows, columns) = offset, into.shape
        into.copy_(whole[top : top + rows, left : left + columns])

    return SimpleNamespace(path="there", shapes={"w": shape}, dtypes={"w": dtype}, fill=fill)


def test_a_resume_reads_the_part_of_a_rank_in_any_precision():
    asked = {"a": {"w": wanted("w", (2, 6))}}
    _fill(asked, files(dtype=torch.bfloat16))
    assert _tensors_of(asked)["a"]["w"].tolist() == torch.arange(12.0, 24.0).view(2, 6).tolist()


@pytest.mark.parametrize(("there", "said"), [
    (files(shape=(4, 7)), r"there: w has shape \(4, 7\) instead of \(4, 6\); use another"),
    (files(dtype=torch.int64), r"there: w is torch.int64 instead of torch.float32; use another")])
def test_a_resume_refuses_other_shapes_and_kinds(there, said):
    with pytest.raises(store.DamagedCheckpoint, match=said):
        _fill({"w": wanted("w", (2, 6))}, there)
