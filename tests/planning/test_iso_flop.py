"""Sparse-IFT's widths: FLOPs and active weights by hand, and recipes that can be run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from plan import main

from megatron_spdf.planning.iso_flop import variants
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.sparsity.plan import Plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs/pretrain"
GPT = {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 128, "max_positions": 32}
LLAMA = {"architecture": "llama", "layers": 1, "hidden": 64, "heads": 4, "query_groups": 2,
         "ffn_hidden": 96, "vocab_size": 128, "max_positions": 32}


@pytest.fixture
def path(tmp_path):
    def write(model: dict, **sections) -> str:
        (tmp_path / "dense.yaml").write_text(yaml.safe_dump({
            "output": "runs/dense", "model": model, "data": {"train": "x"},
            "train": {"tokens": 4096, "global_batch": 4, "micro_batch": 4, "sequence_length": 32},
            "optimizer": {"lr": 1e-3}, **sections}))
        return str(tmp_path / "dense.yaml")
    return write


def found(path: str, level: float, *words: str, tensor: int | None = None) -> dict:
    def load(more):
        return load_recipe(path, [*words, *more])
    return {v.family: v for v in variants(load(()), level, load, tensor)}


def test_a_gpt_by_hand(path):
    """12 d^2 linear weights a layer; attention 12 L T d and logits 6 V d FLOPs a token."""
    made = found(path(GPT), 0.75)
    wide, equal, mlp = (made[name] for name in (
        "Sparse Wide, x 2", "Sparse Wide, x 2, equal in all", "Sparse Parallel of MLPs, x 4"))
    model = wide.recipe.model
    assert (model.hidden, model.heads, model.head_width, model.ffn_hidden) == (128, 8, 16, 512)
    linear, attention = 6 * 2 * 12 * 64**2, 12 * 2 * 32 * 64
    logits = 6 * 128 * 64
    dense = made["dense"].flops
    assert (dense.linear, dense.attention, dense.logits) == (linear, attention, logits)
    assert (wide.flops.linear, wide.flops.attention) == (linear, 2 * attention)
    assert wide.flops.logits == 2 * logits
    assert Plan.of(wide.recipe).active == 2 * 12 * 64**2
    # what attention and the LM head cost more, the linear weights of 2 x 12 x 128^2 cost less
    level = 1 - (linear - attention - logits) / (6 * 2 * 12 * 128**2)
    assert equal.recipe.sparsity.level == round(level, 4) == 0.7917
    assert equal.flops.total == pytest.approx(dense.total, rel=1e-3)
    assert mlp.recipe.model.ffn_hidden == 1024 and mlp.recipe.model.hidden == 64
    assert mlp.flops == dense and set(Plan.of(mlp.recipe).weights) == {
        f"decoder.layers.{layer}.mlp.linear_fc{i}.weight" for layer in (0, 1) for i in (1, 2)}
    assert len(made) == 4  # MLPs need no other level: what does not grow costs what it did


def test_a_llama_has_more_heads_at_its_own_width(path):
    """W_QKV (n + 2 g) w d, W_D n w d, W_I and W_O 3 d f."""
    made = found(path(LLAMA), 0.5)
    parallel = made["Sparse Parallel, x 2"]
    model = parallel.recipe.model
    assert (model.hidden, model.heads, model.query_groups, model.head_width,
            model.ffn_hidden) == (64, 8, 4, 16, 192)
    linear = (4 + 2 * 2) * 16 * 64 + 4 * 16 * 64 + 3 * 64 * 96
    assert Plan.of(parallel.recipe).active == linear == 30720
    assert parallel.flops.linear == made["dense"].flops.linear == 6 * linear
    assert parallel.flops.attention == 2 * made["dense"].flops.attention
    assert parallel.flops.logits == made["dense"].flops.logits


@pytest.mark.parametrize(("name", "level", "tensor", "sizes"), [
    # 768 sqrt 2 = 1086.1: heads in fours, as the dense model's 12 are, or any number of them
    ("gpt2_small_dense", 0.5, None, (1024, 16, 16, 4352)),
    ("gpt2_small_dense", 0.5, 1, (1088, 17, 17, 4352)),
    ("gpt2_small_dense", 0.75, None, (1536, 24, 24, 6144)),
    ("gpt3_xl_dense", 0.9, None, (6144, 48, 48, 25728)),
    # 2048 sqrt 2 = 2896.3 and 8192 sqrt 2 = 11585.2; 8 groups for 8 ranks, 45.3 heads
    ("llama_3_2_1b_s75", 0.5, None, (2880, 48, 8, 11584)),
    ("llama_3_2_1b_s75", 0.75, None, (4096, 64, 16, 16384)),
])
def test_widths_are_whole_heads_and_multiples(name, level, tensor, sizes):
    made = found(str(CONFIGS / f"{name}.yaml"), level, "sparsity=0", tensor=tensor)
    wide = next(v for family, v in made.items() if family.startswith("Sparse Wide"))
    model = wide.recipe.model
    assert (model.hidden, model.heads, model.query_groups, model.ffn_hidden) == sizes
    assert model.head_width == made["dense"].recipe.model.head_width
    ranks = tensor or max(n for n in made["dense"].recipe.model.tensor_degrees() if 8 % n == 0)
    assert ranks in model.tensor_degrees() and model.ffn_hidden % (8 * ranks) == 0
    equal = [v for family, v in made.items() if family.endswith("equal in all")]
    assert equal and all(v.flops.total == pytest.approx(made["dense"].flops.total, rel=1e-3)
                         for v in equal)


def test_ranks_of_the_recipe_divide_what_grows(path):
    made = found(path(LLAMA | {"query_groups": 4}, parallel={"tensor": 4}), 0.5)
    for variant in made.values():
        assert 4 in variant.recipe.model.tensor_degrees()
        assert variant.recipe.parallel.tensor == 4


def test_the_commands_are_recipes_with_the_figures_of_the_table(path, capsys):
    recipe = path(GPT)
    assert main(["iso-flop", recipe, "--sparsity", "0.75", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    outputs = set()
    for row in facts["variants"]:
        made = load_recipe(recipe, row["overrides"])
        flops, model = training_flops(made.model, 32, Plan.of(made)), made.model
        assert [row[part] for part in ("total", "linear", "attention", "logits")] == [
            flops.total, flops.linear, flops.attention, flops.logits]
        assert [row[key] for key in ("hidden", "heads", "head_width", "ffn_hidden")] == [
            model.hidden, model.heads, model.head_width, model.ffn_hidden]
        weights, plan = model.weights(), Plan.of(made)
        zero = sum(w.numel - w.active for w in plan.weights.values())
        linear = sum(w.numel for w in weights if w.linear)
        assert (row["linear_weights"], row["active"]) == (linear, linear - zero)
        assert row["all_active"] == sum(w.numel for w in weights) - zero
        assert row["of_dense"] == row["total"] / facts["variants"][0]["total"]
        outputs.add(made.output)
    assert len({row["all_active"] for row in facts["variants"]}) > 1
    assert len(outputs) == 4 and "runs/dense_wide75" in outputs
    assert main(["iso-flop", recipe, "--sparsity", "0.75", "train.sequence_length=16"]) == 0
    said = capsys.readouterr().out
    assert "sequences of 16, attention" in said
    assert f"{recipe} train.sequence_length=16 model" in said
    assert """'sparsity.rules=[{weights: "*.mlp.*", level: 0.75}]'""" in said
    assert "Sparse Doped does not apply" in said and "+11.11%" in said


def test_the_printed_weights_are_those_of_the_row(path, capsys):
    recipe = path(GPT)
    assert main(["iso-flop", recipe, "--sparsity", "0.75", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["iso-flop", recipe, "--sparsity", "0.75"]) == 0
    said = capsys.readouterr().out
    table = [re.split(r"  +", line.strip()) for line in said.splitlines()]
    heads = next(line for line in table if line[:1] == ["hidden"])
    rows = {line[0]: dict(zip(heads, line[1:], strict=True)) for line in table
            if line[0] in {row["family"] for row in facts["variants"]}}
    for row in facts["variants"]:
        shown = rows[row["family"]]
        for name, key in (("linear weights", "linear_weights"), ("active", "active"),
                          ("all parameters", "all_active")):
            assert shown[f"{name} (M)"] == f"{row[key] / 1e6:.2f}", (row["family"], name)


def test_a_pattern_of_one_level_has_no_other(path):
    made = found(path(GPT, sparsity={"level": 0, "pattern": "2:4"}), 0.5)
    assert [family.split(",")[0] for family in made] == [
        "dense", "Sparse Wide", "Sparse Parallel of MLPs"]
    wide = made["Sparse Wide, x 1.414"].recipe
    assert wide.sparsity.pattern == "2:4" and Plan.of(wide).sparsity == 0.5


def test_a_recipe_with_stages_is_refused(capsys):
    assert main(["iso-flop", str(CONFIGS / "gpt2_small_vspdf.yaml"), "--sparsity", "0.5"]) == 2
    assert "the recipe has stages" in capsys.readouterr().err


@pytest.mark.parametrize(("sections", "words", "said"), [
    ({}, ("--sparsity", "1"), "must be a finite number, over 0.0, under 1.0"),
    ({}, ("--sparsity", "0"), "over 0.0"),
    ({}, (), "--sparsity"),
    ({"sparsity": 0.5}, ("--sparsity", "0.75"),
     "the recipe is sparse already, sparsity.level=0.5; name the dense one, or add sparsity=0"),
    ({"sparsity": {"rules": [{"weights": "*.mlp.*", "level": 0.5}]}}, ("--sparsity", "0.75"),
     "is sparse already"),
    ({}, ("--sparsity", "0.75", "--tensor", "0"), "at least 1"),
])
def test_what_cannot_be_grown_is_refused(path, capsys, sections, words, said):
    try:
        code = main(["iso-flop", path(GPT, **sections), *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err
