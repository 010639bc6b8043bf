"""Checkpoints of DeepSpeed written by hand, at every ZeRO stage: what is cut into flat partitions,
with padding and in groups, is put together again. tests/distributed/test_deepspeed.py reads those
of DeepSpeed itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MODEL

from megatron_spdf.architecture.gpt import Gpt
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader, _shape_in
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import join_slices

SHAPE = Gpt.model_validate(MODEL)
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
COMPACT, MASK = (FC1.removesuffix("weight") + f"parametrizations.weight.{rest}"
                 for rest in ("original", "0.mask_bits"))
WHOLE = {w.name: torch.randn(w.shape, generator=torch.Generator().manual_seed(i))
         for i, w in enumerate(SHAPE.weights())}


def shards(tensor: int) -> list[dict[str, torch.Tensor]]:
    """Parameters of every tensor-parallel rank."""
    axes = {w.name: w.axis for w in SHAPE.weights()}
    return [{name: whole if axes[name] is None else whole.chunk(tensor, axes[name])[rank]
             for name, whole in WHOLE.items()} for rank in range(tensor)]


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((-len(flat) % multiple,), float("nan"))])


def save(place: Path, tensor: int, data: int, zero: int, alignments: bool = False,
         compact: dict | None = None) -> None:
    """Writes the files of a checkpoint, two groups of parameters in it."""
    place.mkdir(parents=True)
    for rank, own in enumerate(shards(tensor)):
        own = {name: t for name, t in own.items() if not (compact and name == FC1)}
        buffers = {}
        if compact:
            own[COMPACT], buffers[MASK] = (compact[k].chunk(tensor)[rank]
                                           for k in ("values", "bits"))
        names = list(own)
        groups = [names[::3], [n for n in names if n not in names[::3]]]
        shapes = [{n: own[n].shape for n in group} for group in groups]
        state = {"module": {n: t.bfloat16() if zero else t for n, t in own.items()} | buffers,
                 "buffer_names": list(buffers), "param_shapes": shapes if zero else None,
                 "dp_world_size": data}
        prefix = "zero_pp_rank_0_" if zero == 3 else ""
        torch.save(state, place / f"{prefix}mp_rank_{rank:02d}_model_states.pt")
        if not zero:
            continue
        gaps = [[3 if alignments else 0 for _ in group] for group in groups]
        for replica in range(data):
            kept = {}
            if zero == 3:
                cut = [padded(own[n].flatten(), data).chunk(data)[replica] for g in groups
                       for n in g]
                half = len(cut) // 2
                kept["fp32_flat_groups"] = [torch.cat(cut[:half]), torch.cat(cut[half:])]
            else:
                flats = [torch.cat([padded_by(own[n].flatten(), gap)
                                    for n, gap in zip(group, gap_of, strict=True)])
                         for group, gap_of in zip(groups, gaps, strict=True)]
                kept["single_partition_of_fp32_groups"] = [
                    padded(flat, 2 * data).chunk(data)[replica] for flat in flats]
                if alignments:
                    kept["param_alignment_paddings"] = gaps
            torch.save({"optimizer_state_dict": kept}, place / (
                f"bf16_zero_pp_rank_{replica}_mp_rank_{rank:02d}_optim_states.pt"))


def padded_by(flat: torch.Tensor, gap: int) -> torch.Tensor:
    return torch.cat([flat, torch.full((gap,), float("nan"))])


@pytest.mark.parametrize(("tensor", "data", "zero", "alignments"), [
    (1, 1, 0, False), (3, 1, 0, False), (1, 1, 1, False), (2, 3, 1, False), (1, 4, 2, True),
    (3, 2, 2, True), (1, 1, 3, False), (2, 3, 3, False), (1, 7, 3, False)])
def test_every_weight_is_put_together(tmp_path, tensor, data, zero, alignments):
    save(tmp_path / "global_step2", tensor, data, zero, alignments)
    (tmp_path / "latest").write_text("global_step2\n")
    for path in (tmp_path, tmp_path / "global_step2"):
        reader = DeepSpeedReader(path, SHAPE)
        assert reader.origin.startswith("the DeepSpeed checkpoint ")
        for name, whole in WHOLE.items():
            assert torch.equal(reader.weight(name), whole), name
            assert reader.master(name).dtype == torch.float32


@pytest.mark.parametrize(("tensor", "data", "zero"), [(1, 1, 0), (3, 1, 0), (2, 2, 1), (1, 3, 3)])
def test_a_compact_weight_is_expanded_by_its_mask(tmp_path, tensor, data, zero):
    weight = next(w for w in SHAPE.weights() if w.name == FC1)
    planned = SparseWeight(FC1, weight.shape, weight.axis, 6, 0.0)
    entries = math.prod(planned.slice_shape)
    draw = np.random.default_rng(0)
    masks = np.zeros((6, entries), bool)
    for row in masks:
        row[draw.permutation(entries)[:13]] = True
    values = torch.randn(6, 13, generator=torch.Generator().manual_seed(9))
    compact = {"values": values, "bits": torch.from_numpy(np.packbits(masks, axis=1))}
    save(tmp_path / "step", tensor, data, zero, compact=compact)
    dense = torch.zeros(6, entries)
    dense[torch.from_numpy(masks)] = values.flatten()
    found = DeepSpeedReader(tmp_path / "step", SHAPE).weight(FC1)
    assert torch.equal(found, join_slices(dense, planned))
    compact["bits"][2, 0] ^= 128
    save(tmp_path / "other", tensor, data, zero, compact=compact)
    with pytest.raises(ValueError, match="has 13 values in each slice, another number than of"):
        DeepSpeedReader(tmp_path / "other", SHAPE).weight(FC1)


@pytest.mark.parametrize(("name", "said"), [
    ("mp_rank_01_model_states.pt", r"model states of mp ranks \[0, 2\]"),
    ("bf16_zero_pp_rank_1_mp_rank_02_optim_states.pt",
     r"optimizer states of \(mp, dp\) ranks \[\(0, 0\), \(0, 1\)")])
def test_files_of_every_rank_are_needed(tmp_path, name, said):
    save(tmp_path / "step", 3, 2, 1)
    (tmp_path / "step" / name).unlink()
    with pytest.raises(ValueError, match=f"lacks files of some ranks: .*{said}"):
        DeepSpeedReader(tmp_path / "step", SHAPE)


def test_files_of_every_replica_are_needed(tmp_path):
    save(tmp_path / "step", 1, 3, 1)
    (tmp_path / "step" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="has the optimizer states of 2 of 3 data-parallel ranks"):
        DeepSpeedReader(tmp_path / "step", SHAPE)


@pytest.mark.parametrize(("change", "said"), [
    ({"hidden": 24, "ffn_hidden": 30}, r"is \(.*\) there and \(.*\) in the recipe's model"),
    ({"layers": 3}, "it has no decoder.layers.2."),
    ({"layers": 1}, "it has decoder.layers.1..* too")])
def test_other_models_are_refused(tmp_path, change, said):
    save(tmp_path / "step", 2, 1, 1)
    with pytest.raises(ValueError, match=f"cut for 2 tensor-parallel ranks: .*{said}"):
        DeepSpeedReader(tmp_path / "step", Gpt.model_validate(MODEL | change))


@pytest.mark.parametrize("shape", [(2, -1), (2.0,), (True, 2), [2], "2", (2, None)])
def test_a_shape_is_of_whole_numbers(shape):
    with pytest.raises(TypeError, match="no shape"):
        _shape_in(shape)
    assert _shape_in(torch.Size((2, 0))) == (2, 0)
