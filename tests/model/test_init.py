"""Initial values: the stored stream, the same at every layout; ones, zeros, and values of a trained
model with drawn ones in the place of its zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from megatron_spdf.architecture.base import Weight
from megatron_spdf.model import decoder
from megatron_spdf.model.init import REVIVED, DrawnWeights, LoadedWeights, draw_values
from megatron_spdf.model.parametrization import Parametrization
from megatron_spdf.sparsity.plan import Plan

QKV = Weight("decoder.layers.0.self_attention.linear_qkv.weight", (24, 8), 0, 0, 0.02, linear=True)
PROJ = Weight("decoder.layers.1.mlp.linear_fc2.weight", (8, 24), 1, 1, 0.5, linear=True)
POSITIONS = Weight("embedding.position_embeddings.weight", (6, 8), None, -1, 0.02)
NORM = Weight("decoder.final_layernorm.weight", (8,), None, 2)
BIAS = Weight("decoder.layers.0.mlp.linear_fc1.bias", (24,), 0, 0)
SLICES = 4

# Other values mean that a run of a recipe does not begin as it did. Its first, in units of the
# spread: by (weight, seed, slice).
STORED = {
    (QKV, 0, 0): [-0.09856, 0.76863, 0.40434, -1.16607],
    (QKV, 0, 3): [-0.913, 0.5385, -1.53259, 0.19974],
    (QKV, 7, 0): [-1.85033, -0.05838, 0.99403, -0.5898],
    (PROJ, 0, 1): [0.78874, 0.19708, 0.23992, 1.51343],
    (POSITIONS, 0, 0): [0.94056, -1.27685, 0.23453, -0.48822]}


@pytest.mark.parametrize(("weight", "seed", "number"), STORED, ids=lambda v: getattr(v, "name", v))
def test_values_are_those_of_the_stored_stream(weight, seed, number):
    whole = draw_values(weight, seed, SLICES, 0, 1)
    assert whole.shape == weight.shape and whole.dtype == torch.float32
    part = whole if weight.axis is None else whole.chunk(SLICES, weight.axis)[number]
    found = (part.flatten()[:4] / weight.std).tolist()
    assert found == pytest.approx(STORED[weight, seed, number], abs=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("weight", [QKV, PROJ, POSITIONS], ids=lambda w: w.name)
def test_ranks_draw_their_part_of_one_weight(weight, world):
    whole = draw_values(weight, 3, SLICES, 0, 1)
    parts = [draw_values(weight, 3, SLICES, rank, world) for rank in range(world)]
    if weight.axis is None:
        assert all(torch.equal(part, whole) for part in parts)
    else:
        assert torch.equal(torch.cat(parts, weight.axis), whole)


def test_values_are_normal_with_the_weights_spread():
    large = Weight("w", (512, 256), 0, 0, 0.3, linear=True)
    values = draw_values(large, 0, 8, 0, 1).double() / 0.3
    assert abs(values.mean()) < 5 / 512**0.5 / 16 and abs(values.std() - 1.0) < 0.01
    assert abs((values**4).mean() - 3.0) < 0.1
    # slices, seeds, names and streams have values of their own
    others = [draw_values(large, 1, 8, 0, 1), draw_values(large, 0, 8, 0, 1, REVIVED),
              draw_values(Weight("v", large.shape, 0, 0, 0.3), 0, 8, 0, 1),
              values.roll(64, 0) * 0.3]
    for other in others:
        assert abs((values * other / 0.3).mean()) < 0.02


@pytest.mark.parametrize("world", [1, 2])
def test_norms_begin_at_one_and_biases_at_zero(world):
    drawn = DrawnWeights(seed=3, slices=SLICES)
    assert torch.equal(drawn.shard(NORM, 0, world), torch.ones(8))
    assert torch.equal(drawn.shard(BIAS, world - 1, world), torch.zeros(24 // world))
    assert torch.equal(drawn.shard(PROJ, world - 1, world),
                       draw_values(PROJ, 3, SLICES, world - 1, world))
    assert drawn.mask_bits(PROJ, 0, world) is None


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("weight", [QKV, PROJ, POSITIONS, BIAS], ids=lambda w: w.name)
def test_loaded_values_are_cut_and_zeros_of_linear_weights_revived(weight, world):
    """With twice the weight's spread, from a stream of their own."""
    whole = torch.arange(float(weight.numel)).view(weight.shape).bfloat16()
    whole[whole % 3 == 0] = 0.0
    as_it_is, revived = LoadedWeights(lambda name: whole), LoadedWeights(
        lambda name: whole, revived=2.0, seed=5, slices=SLICES)
    axis = 0 if weight.axis is None else weight.axis
    parts = whole.float().chunk(world, axis) if weight.axis is not None else [whole.float()] * world
    for rank, part in enumerate(parts):
        assert torch.equal(as_it_is.shard(weight, rank, world), part)
        found = revived.shard(weight, rank, world)
        if not weight.linear:
            assert torch.equal(found, part)
            continue
        drawn = 2.0 * draw_values(weight, 5, SLICES, rank, world, REVIVED)
        assert torch.equal(found, torch.where(part == 0, drawn, part)) and (found != 0).all()


def test_given_masks_are_cut_by_slices():
    bits = np.arange(SLICES * 6, dtype=np.uint8).reshape(SLICES, 6)
    given = LoadedWeights(lambda name: None, lambda name: bits if name == QKV.name else None)
    assert np.array_equal(given.mask_bits(QKV, 1, 2), bits[2:])
    assert np.array_equal(given.mask_bits(QKV, 3, 4), bits[3:])
    assert LoadedWeights(lambda name: None).mask_bits(QKV, 0, 1) is None


@pytest.mark.parametrize(("algorithm", "own"), [("static", False), ("ste", False),
                                                ("top_kast", True)])
def test_the_optimizer_decays_all_weights_but_those_that_top_kast_pulls(recipe, monkeypatch,
                                                                        algorithm, own):
    made, modules = recipe(sparsity={"level": 0.75, "algorithm": algorithm}), {}
    for weight in made.model.weights():
        place, _, key = weight.name.rpartition(".")
        parameter = nn.Parameter(torch.zeros(weight.shape))
        modules.setdefault(place, nn.Module()).register_parameter(key, parameter)
    monkeypatch.setattr(decoder, "canonical_modules", lambda _: list(modules.items()))
    for name in ("sparsify_layer", "initialize"):
        monkeypatch.setattr(decoder, name, lambda *_: None)
    monkeypatch.setattr(decoder.ps, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(decoder.ps, "get_tensor_model_parallel_world_size", lambda: 1)
    decoder._fill(None, Parametrization(made, Plan.of(made)), None)
    pulled = {f"{place}.{key}" for place, module in modules.items()
              for key, parameter in module.named_parameters() if parameter.own_decay}
    assert pulled == ({w.name for w in made.model.weights() if w.linear} if own else set())
