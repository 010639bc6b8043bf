"""Weights that keep all entries and choose their masks follow their papers' rules on dense weights,
step by step, at every layout and across every stop."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from curves import close_but_for_ties
from finetune_cases import densified_start, finetuned
from keeping_cases import following, largest, noting, plainly
from pruning_cases import pruned
from safetensors.numpy import load_file
from stage_cases import across
from test_pruning import LAYOUTS, STRAIGHT, depth_of, kept, recipes_of

from megatron_spdf.checkpoint.inspect import describe, render, verify
from megatron_spdf.checkpoint.mask_progress import mask_progress
from megatron_spdf.checkpoint.reader import (
    VALUES,
    CheckpointReader,
    find_checkpoint,
    stored_name,
)
from megatron_spdf.convert.huggingface_export import export
from megatron_spdf.convert.reshard import reshard
from megatron_spdf.recipe.recipe import Parallel

pytestmark = pytest.mark.slow

SPARSITY = {
    "ste": {"level": 0.75, "algorithm": "ste"},
    "n_m": {"level": 0.5, "pattern": "n_m", "algorithm": "ste"},
    "top_kast": {"level": 0.75, "algorithm": "top_kast", "update": {"every": 5, "penalty": 1e-2}},
    # not in every step, since a choice of balanced tiles takes longer than a step
    "tiles": {"level": 0.75, "pattern": "tile", "tile": 4, "algorithm": "ste",
              "update": {"every": 5}},
    # less often, since a near tie of two masks of a tile changes up to eight entries at once
    "2:4": {"level": 0.5, "pattern": "2:4", "algorithm": "ste", "update": {"every": 20}},
    "ste with decay": {"level": 0.75, "algorithm": "ste", "update": {"decay_masked": 2e-2}},
}


@pytest.fixture(scope="module")
def recipe(make_recipe):
    """A recipe that trains by a rule, at a layout."""
    return recipes_of(make_recipe, SPARSITY)


@pytest.fixture(scope="module")
def reference(ranks, recipe):
    """A run by a rule, of a depth, whose masks others follow: under plain PyTorch, of tiles in one
    process."""
    def reference(rule: str, depth: dict | None) -> dict:
        if rule in ("tiles", "2:4"):
            return ranks(1).run(noting, recipe(rule, depth))
        return ranks(1).run(plainly, recipe(rule, depth), rule.split()[0])
    return kept(reference)


@pytest.mark.parametrize("rule", ["ste", "ste with decay", "n_m", "top_kast"])
def test_a_run_equals_the_rule_on_dense_weights(ranks, recipe, reference, rule):
    expected = reference(rule)
    close_but_for_ties(ranks(1).run_all(following, [recipe(rule)], [None], expected["choices"]),
                       expected)


@pytest.mark.parametrize(("name", "rule"), [
    *((name, "ste with decay") for name in STRAIGHT), ("tp2 sp", "n_m"), ("tp2 sp", "tiles"),
    ("tp2 sp", "top_kast"), ("pp2 interleaved", "top_kast"),
    ("pp2 interleaved", "2:4"), ("dp2 zero 1", "top_kast"), ("deepspeed zero 3", "top_kast")])
def test_every_layout_chooses_alike(ranks, recipe, reference, name, rule):
    expected = reference(rule, depth_of(name))
    recipes = [recipe(rule, LAYOUTS[name] | depth_of(name))]
    close_but_for_ties(ranks(2).run_all(following, recipes, [None], expected["choices"]), expected)


@pytest.mark.parametrize(("rule", "names", "stops"), [
    ("ste with decay", ["dp2 zero 1", "tp2 sp", "deepspeed zero 3"], [28, 17]),
    # before, at and after a choice
    ("top_kast", ["deepspeed zero 2", "pp2", "tp2 sp", "dp2 zero 1"], [29, 1, 1]),
])
def test_a_run_that_stops_goes_on_at_another_layout(ranks, recipe, reference, rule, names, stops):
    expected = reference(rule)
    recipes = [recipe(rule, LAYOUTS[name]) for name in names]
    close_but_for_ties(ranks(2).run_all(following, recipes, [*stops, None], expected["choices"]),
                       expected)


@pytest.mark.parametrize("name", ["tp2 sp", "dp2 zero 1", "deepspeed zero 3"])
def test_under_bf16_the_weights_that_run_choose(ranks, make_recipe, tmp_path, name):
    """By a stable sort of what the checkpoint has as weights; with products layer by layer where
    the engine can."""
    recipe = make_recipe(str(tmp_path / "run"), sparsity=SPARSITY["ste with decay"] | {
        "dense_copy": "per_layer"}, log={"every": 1}, **{**LAYOUTS[name], "train": {
            "tokens": 8 * 32 * 6, "precision": "bf16"}})
    found = ranks(2).run(pruned, [recipe], [None])
    assert found["losses"][-1] < found["losses"][0]
    reader = CheckpointReader(find_checkpoint(tmp_path / "run"))
    for name, w in reader.plan.weights.items():
        values = reader.tensor(stored_name(name) + VALUES)
        assert values.dtype == torch.bfloat16
        for entries, bits in zip(values.float().numpy(), reader.mask_bits(name), strict=True):
            mask = np.unpackbits(bits, count=entries.size).astype(bool)
            assert np.array_equal(mask, largest(entries, w.active_per_slice)), name


@pytest.fixture(scope="module")
def trained(ranks, make_deep_recipe, tmp_path_factory):
    """Recipe of a run by Top-KAST that has a checkpoint, the last choice of masks some steps before
    it."""
    recipe = make_deep_recipe(str(tmp_path_factory.mktemp("trained") / "run"),
                              sparsity=SPARSITY["top_kast"], train={"tokens": 8 * 32 * 13},
                              log={"every": 2},
                              checkpoint={"every": 0, "asynchronous": False})
    ranks(1).run(pruned, [recipe], [None])
    return recipe


@pytest.fixture(scope="module")
def tuning(trained, tmp_path_factory):
    """A recipe of fine-tuning from it."""
    place = tmp_path_factory.mktemp("task")
    for split in ("train", "validation"):
        (place / f"{split}.jsonl").write_text(16 * (json.dumps(
            {"context": "self return", "completion": "import class"}) + "\n"))
    return {"checkpoint": trained["output"], "output": None, "engine": "megatron", "seed": 7,
            "data": {"task": "jsonl", "path": str(place)}, "optimizer": {"lr": 1e-3},
            "train": {"epochs": 2, "global_batch": 8, "micro_batch": 8, "precision": "fp32"}}


def test_what_is_read_inspected_resharded_and_exported_is_masked(trained, tmp_path):
    reader = CheckpointReader(find_checkpoint(Path(trained["output"])), checksums=True)
    assert "masks are as planned" in verify(reader)
    assert "moved 2 times by top_kast" in render(describe(reader))
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    weight, entries = reader.weight(name), reader.entries(name, "param")
    assert (weight != 0).float().mean() == pytest.approx(0.25, abs=1e-3) and entries.all()
    assert torch.equal(weight, entries * (weight != 0))
    moved = reshard(reader, Parallel(tensor=2, pipeline=2), tmp_path / "resharded")
    again = CheckpointReader(moved, checksums=True)
    verify(again)
    assert torch.equal(again.entries(name, "param"), entries)
    assert all(torch.equal(again.tensor(key), reader.tensor(key)) for key in reader.shapes)
    export(reader, tmp_path / "exported")
    there = load_file(tmp_path / "exported" / "model.safetensors")
    assert np.array_equal(there["transformer.h.1.mlp.c_fc.weight"].T, weight.numpy())


def test_the_log_says_what_a_choice_changed(trained):
    """Due after steps 5 and 10, made in the next, and said when the log is."""
    lines = (Path(trained["output"]) / "log.jsonl").read_text().splitlines()
    moves = [r for r in map(json.loads, lines) if r["kind"] == "mask"]
    assert [(r["step"], r["update"], r["algorithm"]) for r in moves] == [
        (6, 1, "top_kast"), (12, 2, "top_kast")]
    assert all(0 < r["moved"] and 0 < r["share"] < 0.5 and "seconds" not in r for r in moves)
    reader = CheckpointReader(find_checkpoint(Path(trained["output"])))
    first, last = moves  # the first mask is that of the initial weights
    assert first["overlap"] == pytest.approx(1.0 - first["share"], abs=1e-12)
    common = {name: np.unpackbits(reader.mask_bits(name) & reader.first_bits(name)).sum()
              for name in reader.plan.weights}
    assert last["overlap"] == pytest.approx(sum(common.values()) / reader.plan.active)
    layers = mask_progress(reader)["layers"]
    assert layers == {n: pytest.approx(seen["overlap"]) for n, seen in last["layers"].items()}
    assert list(layers) == ["0", "1", "2", "3"]


def test_fine_tuning_goes_on_dense_or_with_the_masks_at_the_end(ranks, trained, tuning):
    dense = ranks(1).run(densified_start, trained, tuning)
    assert dense["difference"] <= 1e-5 * dense["spread"]
    sparse = ranks(1).run(finetuned, tuning | {"mode": "sparse"}, steps=3)
    reader = CheckpointReader(find_checkpoint(Path(trained["output"])))
    for (name, number), digest in sparse["masks"].items():
        bits = reader.mask_bits(name)[number]
        assert digest == hashlib.sha256(bits.tobytes()).hexdigest(), (name, number)
    assert sparse["sparsity"] == pytest.approx(dict.fromkeys(sparse["sparsity"], 0.75), abs=2e-3)


@pytest.mark.parametrize(("before", "after"), [
    (SPARSITY["ste"], 0.0), (SPARSITY["top_kast"], 0.75), (0.75, SPARSITY["ste"])],
    ids=["to dense", "to static", "from static"])
def test_a_border_between_stages_changes_no_output(ranks, make_recipe, before, after):
    stages = [{"share": 0.5, "sparsity": sparsity, "lr": 1e-3, "warmup_tokens": 256}
              for sparsity in (before, after)]
    recipe = make_recipe(sparsity=0.0, stages=stages, train={"tokens": 8 * 32 * 8})
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    seen = ranks(1).run(across, recipe, ids)
    torch.testing.assert_close(seen["before"], seen["after"], atol=1e-5, rtol=0)
    assert len(seen["stage"]) == 4
