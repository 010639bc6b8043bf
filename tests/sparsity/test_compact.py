"""The compact weight: against plain boolean indexing, over ranks, in autograd, on an ordinary
layer, and back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from megatron_spdf.kernels import dispatch
from megatron_spdf.layers.compact import (
    CompactWeight,
    _Expand,
    compact_of,
    densify,
    expanded,
    make_compact,
    sparse_modules,
)
from megatron_spdf.layers.products.base import Product
from megatron_spdf.sparsity.algorithms.gmp import Gmp
from megatron_spdf.sparsity.patterns.tiles import Tiles
from megatron_spdf.sparsity.patterns.unstructured import draw_mask
from megatron_spdf.sparsity.plan import SparseWeight

TILED = [SparseWeight("w.tiled", (48, 64), 0, 2, 0.75, Tiles(tile=8)),
         SparseWeight("w.held", (24, 10), 0, 4, 0.5, algorithm=Gmp())]
SEED = 5
WEIGHTS = [SparseWeight("w.qkv", (24, 6), 0, 4, 0.75), SparseWeight("w.proj", (6, 20), 1, 4, 0.7),
           SparseWeight("w.odd", (12, 7), 0, 4, 0.5), SparseWeight("w.one", (5, 3), 1, 1, 0.6)]
CASES = [(weight, world) for weight in WEIGHTS for world in (1, 2, 4) if weight.slices % world == 0]
each_layout = pytest.mark.parametrize("weight, world", CASES, ids=lambda v: getattr(v, "name", v))
each_weight = pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: w.name)


def slice_masks(weight: SparseWeight) -> list[Tensor]:
    shape, k = weight.slice_shape, weight.active_per_slice
    drawn = (draw_mask(SEED, weight.name, c, shape[0] * shape[1], k) for c in range(weight.slices))
    return [torch.from_numpy(mask).view(shape) for mask in drawn]


def whole_mask(weight: SparseWeight) -> Tensor:
    return torch.cat(slice_masks(weight), dim=weight.axis)


def compacts(weight: SparseWeight, world: int) -> list[CompactWeight]:
    return [CompactWeight(weight, SEED, rank, world, "cpu") for rank in range(world)]


def shards(dense: Tensor, weight: SparseWeight, world: int) -> tuple[Tensor, ...]:
    return dense.chunk(world, dim=weight.axis)


def dense_of(weight: SparseWeight) -> Tensor:
    return torch.arange(1.0, weight.numel + 1).view(weight.shape)


@each_layout
def test_expanded_compressed_weight_is_the_masked_weight(weight, world):
    dense, mask = dense_of(weight), whole_mask(weight)
    for compact, part, active in zip(
            compacts(weight, world), shards(dense, weight, world), shards(mask, weight, world),
        strict=True):
        assert torch.equal(compact(compact.right_inverse(part)), torch.where(active, part, 0.0))


@each_layout
def test_values_are_the_active_entries_slice_after_slice(weight, world):
    dense = dense_of(weight)
    wanted = torch.stack([slice_id[mask] for slice_id, mask in zip(
        dense.chunk(weight.slices, dim=weight.axis), slice_masks(weight), strict=True)])
    parts = shards(dense, weight, world)
    found = torch.cat([c.right_inverse(part) for c,
                       part in zip(compacts(weight, world), parts, strict=True)])
    assert torch.equal(found, wanted)


@each_layout
def test_masks_of_all_ranks_together_are_the_same_at_every_world(weight, world):
    masks = [c(torch.ones(c.values_shape)) != 0 for c in compacts(weight, world)]
    assert torch.equal(torch.cat(masks, dim=weight.axis), whole_mask(weight))


@each_layout
def test_mask_bits_of_all_ranks_together_are_the_slices_masks(weight, world):
    bits = torch.cat([c.mask_bits for c in compacts(weight, world)]).numpy()
    entries = weight.numel // weight.slices
    assert bits.shape == (weight.slices, -(-entries // 8))
    unpacked = np.unpackbits(bits, axis=1, count=entries).astype(bool)
    assert np.array_equal(unpacked, np.stack([m.flatten().numpy() for m in slice_masks(weight)]))


@each_weight
def test_mask_is_no_parameter_and_positions_are_not_saved(weight):
    compact = CompactWeight(weight, SEED, 0, 1, "cpu")
    assert list(compact.parameters()) == []
    assert list(compact.state_dict()) == ["mask_bits"]


@each_weight
def test_gradient_is_that_of_an_explicitly_masked_weight(weight):
    torch.manual_seed(0)
    compact = CompactWeight(weight, SEED, 0, 1, "cpu")
    dense = torch.randn(weight.shape, dtype=torch.float64, requires_grad=True)
    values = compact.right_inverse(dense.detach()).requires_grad_()
    x = torch.randn(9, weight.shape[1], dtype=torch.float64)
    (x @ compact(values).T).tanh().sum().backward()
    (x @ (dense * whole_mask(weight)).T).tanh().sum().backward()
    assert values.grad.shape == compact.values_shape
    torch.testing.assert_close(values.grad, compact.right_inverse(dense.grad))


@each_layout
def test_gradcheck(weight, world):
    compact = compacts(weight, world)[-1]
    values = torch.randn(compact.values_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: _Expand.apply(v, compact), (values,))


@pytest.mark.parametrize(("weight", "world"), [
    *CASES, *((weight, world) for weight in TILED for world in (1, 2))],
    ids=lambda v: getattr(v, "name", v))
def test_on_the_meta_device_masks_have_the_shapes_of_others(weight, world):
    there, here = (CompactWeight(weight, SEED, world - 1, world, device)
                   for device in ("meta", "cpu"))
    assert {name: (b.shape, b.dtype) for name, b in there.state_dict().items()} == {
        name: (b.shape, b.dtype) for name, b in here.state_dict().items()}
    assert there.shape == here.shape and there.values_shape == here.values_shape
    assert there(torch.empty(there.values_shape, device="meta")).shape == there.shape


WEIGHT = SparseWeight("layer.weight", (8, 12), 0, 2, 0.75)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(1)
    module = nn.Linear(12, 8)
    module.weight.tensor_model_parallel, module.weight.partition_dim = True, 0
    return module


@pytest.fixture
def sparse(layer) -> nn.Linear:
    make_compact(layer, CompactWeight(WEIGHT, SEED, 0, 1, "cpu"))
    return layer


def values_of(module: nn.Module) -> nn.Parameter:
    return module.parametrizations.weight.original


def micro_batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(4, 12) for _ in range(count)]


def test_the_only_parameters_are_active_values_and_bias(sparse):
    assert {n: tuple(p.shape) for n, p in sparse.named_parameters()} == {
        "bias": (8,), "parametrizations.weight.original": (2, 12)}


def test_sparse_layer_computes_with_the_masked_weight(layer):
    masked = torch.where(whole_mask(WEIGHT), layer.weight.detach(), 0.0)
    make_compact(layer, CompactWeight(WEIGHT, SEED, 0, 1, "cpu"))
    assert torch.equal(layer.weight, masked)
    x = micro_batches()[0]
    assert torch.equal(layer(x), nn.functional.linear(x, masked, layer.bias))


def test_attributes_move_to_the_values_and_back(sparse):
    values = values_of(sparse)
    assert (values.tensor_model_parallel, values.partition_dim) == (True, 0)
    values.shared = True
    densify(sparse)
    weight = sparse.weight
    assert (weight.tensor_model_parallel, weight.partition_dim, weight.shared) == (True, 0, True)


def test_sparse_modules_are_found(sparse):
    model = nn.Sequential(nn.Linear(3, 3), sparse)
    assert list(sparse_modules(model)) == [sparse]
    assert compact_of(sparse).planned is WEIGHT and compact_of(model[0]) is None


def test_shard_of_another_shape_is_refused(layer):
    with pytest.raises(AssertionError):
        make_compact(layer, CompactWeight(WEIGHT, SEED, 0, 2, "cpu"))


def test_no_optimizer_step_revives_a_masked_weight(sparse):
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for x in micro_batches():
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparse.weight != 0, whole_mask(WEIGHT))


def test_densify_changes_no_output(sparse):
    x = micro_batches()[0]
    before, weight = sparse(x), sparse.weight.detach().clone()
    densify(nn.Sequential(sparse))
    assert torch.equal(sparse(x), before)
    assert torch.equal(sparse.weight, weight)


def test_what_a_layer_has_of_its_own_while_it_is_compact_goes_with_that(layer):
    make_compact(layer, CompactWeight(WEIGHT, SEED, 0, 1, "cpu"), forward=lambda x: 2 * x)
    assert layer(3) == 6
    assert "forward" not in vars(densify(layer)) and layer(torch.zeros(1, 12)).shape == (1, 8)


def test_densified_layer_is_an_ordinary_one(sparse):
    densify(sparse)
    assert (
        type(sparse.weight) is nn.Parameter
        and sparse.weight.requires_grad
        and sparse.weight.is_leaf
    )
    assert sorted(sparse.state_dict()) == ["bias", "weight"]
    assert list(sparse_modules(sparse)) == []
    assert not sparse.weight[~whole_mask(WEIGHT)].any()
    sparse(micro_batches()[0]).square().sum().backward()
    assert sparse.weight.grad[~whole_mask(WEIGHT)].any()


def test_what_does_not_train_does_not_train_when_it_is_densified(sparse):
    values_of(sparse).requires_grad_(False)
    assert not densify(sparse).weight.requires_grad


def summed_gradient(module: nn.Module, batches: list[Tensor]) -> Tensor:
    reference = copy.deepcopy(module)
    sum(reference(x).square().sum() for x in batches).backward()
    return values_of(reference).grad


def test_expanded_keeps_one_copy(sparse, monkeypatch):
    calls = []
    expand = dispatch.expand
    monkeypatch.setattr(dispatch, "expand", lambda *a: calls.append(a) or expand(*a))
    with expanded(sparse):
        assert len(calls) == 1
        first = sparse.weight
        for x in micro_batches():
            sparse(x)
        assert sparse.weight is first and len(calls) == 1
    assert sparse.weight is not first


@pytest.mark.parametrize(("product", "at_once", "copies"), [
    (None, True, 1), (None, False, 0), (Product(), True, 0)])
def test_what_multiplies_with_the_values_has_no_copy(layer, monkeypatch, product, at_once, copies):
    make_compact(layer, CompactWeight(WEIGHT, SEED, 0, 1, "cpu", product))
    calls, expand = [], dispatch.expand
    monkeypatch.setattr(dispatch, "expand", lambda *a: calls.append(a) or expand(*a))
    with expanded(layer, at_once):
        assert len(calls) == copies


def test_copy_does_not_outlive_the_context(sparse):
    with expanded(sparse):
        before = sparse.weight.detach().clone()
    with torch.no_grad():
        values_of(sparse).mul_(2)
    assert torch.equal(sparse.weight, 2 * before)


def test_gradients_of_micro_batches_add_up_through_one_copy(sparse):
    wanted = summed_gradient(sparse, micro_batches())
    with expanded(sparse):
        for x in micro_batches():
            sparse(x).square().sum().backward()
    torch.testing.assert_close(values_of(sparse).grad, wanted)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_add_up_under_recomputation(sparse, use_reentrant):
    wanted = summed_gradient(sparse, micro_batches())
    with expanded(sparse):
        for x in micro_batches():
            checkpoint(sparse, x.requires_grad_(),
                       use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(values_of(sparse).grad, wanted)


def test_a_copy_made_on_first_use_would_lose_the_gradient_under_recomputation(sparse):
    with parametrize.cached():
        checkpoint(sparse, micro_batches()[0].requires_grad_(),
                   use_reentrant=True).square().sum().backward()
    assert values_of(sparse).grad is None


def test_held_entries_get_no_gradient_and_others_theirs():
    weight = SparseWeight("w", (24, 6), 0, 4, 0.5, algorithm=Gmp())
    compact, free = (CompactWeight(w, SEED, 0, 1, "cpu") for w in
                     (weight, SparseWeight("w", (24, 6), 0, 4, 0.5)))
    assert compact.kept is None
    kept = torch.rand(compact.values_shape, generator=torch.Generator().manual_seed(0)) < 0.7
    compact.hold(kept)
    assert torch.equal(compact.kept, kept)
    found = []
    for each in (compact, free):
        values = torch.ones(each.values_shape, requires_grad=True)
        (each(values) * torch.arange(144.0).view(24, 6)).sum().backward()
        found.append(values.grad)
    assert torch.equal(found[0], found[1] * kept) and not torch.equal(found[0], found[1])
    # a checkpoint that is read in takes the place of what was held
    other = CompactWeight(weight, SEED, 0, 1, "cpu")
    assert other.kept is None
    other.load_state_dict(compact.state_dict())
    assert torch.equal(other.kept, kept)


@pytest.mark.parametrize("weight", [*WEIGHTS, *TILED], ids=lambda w: w.name)
def test_the_norm_that_clips_sees_no_dead_entry(weight):
    """Its gradient may be a million times that of the active ones; held entries are dead too."""
    compact, mask = CompactWeight(weight, SEED, 0, 1, "cpu"), None
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    norms = []
    if weight.algorithm.holds:
        compact.hold(torch.arange(compact.values_shape[1]).expand(compact.values_shape) % 3 > 0)
    for scale in (1.0, 1e6):
        values = torch.ones(compact.values_shape, requires_grad=True)
        dense = compact(values)
        if mask is None:
            kept = values.detach() if compact.kept is None else compact.kept.float()
            mask = compact.expand(kept, compact.mask) != 0
        (dense * gradient * torch.where(mask, 1.0, scale)).sum().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([values], 1.0)))
    assert norms[0] == norms[1] == pytest.approx(float(gradient[mask].norm()), rel=1e-6)
    assert 0 < mask.sum() < weight.active + 1
