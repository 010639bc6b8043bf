"""Every rule between fields at its edge: the last value that it allows, and the next one, which it
refuses alone and by the figures of the recipe."""

from __future__ import annotations

import pytest

from megatron_spdf.recipe.finetune import Finetune, _finetune_violations
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.rules import batch_violations, rule_violations

# ten steps of 8 sequences of 30 tokens
SIZES = """
output: run
model: {layers: 12, hidden: 72, heads: 6, query_groups: 6, vocab_size: 256, max_positions: 30}
train: {tokens: 2400, global_batch: 8, micro_batch: 2}
optimizer: {lr: 1.0e-3}
"""
SHARES = "stages=[{{share: {}, sparsity: {}, warmup_tokens: {}}}, {{share: {}, sparsity: 0.5}}]"
SET, GMP = (["sparsity.level=0.5", f"sparsity.algorithm={name}", "sparsity.update.every=1",
             "sparsity.update.stop=0.5"] for name in ("set", "gmp"))
ACDC = ["sparsity.level=0.5", "sparsity.algorithm=acdc"]
GRAPH = "kernels.cuda_graph=true"
# allowed, refused, what is said
EDGES = {
    "positions": (["train.sequence_length=30"], ["train.sequence_length=31"],
                  "train.sequence_length=31 is over model.max_positions=30"),
    "tensor": (["parallel.tensor=3"], ["parallel.tensor=4"],
               "model.query_groups=6 (heads=6) is not divisible by parallel.tensor=4; tensor may be"
               " [1, 2, 3, 6]"),
    "groups bound tensor": (["parallel.tensor=2", "model.query_groups=2"],
                            ["parallel.tensor=3", "model.query_groups=2"],
                            "model.query_groups=2 (heads=6) is not divisible by parallel.tensor=3"),
    "pipeline": (["parallel.pipeline=6"], ["parallel.pipeline=8"],
                 "model.layers=12 is not divisible by parallel.pipeline x interleave = 8 x 1 = 8; "
                 "the product may be [1, 2, 3, 4, 6, 12]"),
    "chunks": (["parallel.pipeline=2", "parallel.interleave=6"],
               ["parallel.pipeline=2", "parallel.interleave=5"],
               "parallel.pipeline x interleave = 2 x 5 = 10"),
    "interleave": (["parallel.interleave=2", "parallel.pipeline=2"], ["parallel.interleave=2"],
                   "parallel.interleave=2 needs parallel.pipeline > 1"),
    "micro-batches interleaved": (
        ["parallel.interleave=3", "parallel.pipeline=4"],
        ["parallel.interleave=3", "parallel.pipeline=4", "train.micro_batch=4"],
        "2 micro-batches per step are not divisible by parallel.pipeline=4"),
    "micro-batches not interleaved": (["parallel.pipeline=4", "train.micro_batch=4"],
                                      ["parallel.pipeline=4", "train.micro_batch=3"],
                                      "train.global_batch=8 is not divisible"),
    "micro-batch of one": (["train.micro_batch=auto", "parallel.data=8"],
                           ["train.micro_batch=auto", "parallel.data=3"],
                           "train.micro_batch x parallel.data = 1 x 3 = 3; global_batch may be 6 "
                           "or 9"),
    "sequence": (["parallel.sequence=true", "parallel.tensor=2"], ["parallel.sequence=true"],
                 "parallel.sequence=true needs parallel.tensor > 1"),
    "length of a sequence": (
        ["parallel.sequence=true", "parallel.tensor=3", "train.sequence_length=27"],
        ["parallel.sequence=true", "parallel.tensor=3", "train.sequence_length=28"],
        "train.sequence_length=28 is not divisible by parallel.tensor=3"),
    "any length without": (["parallel.tensor=3", "train.sequence_length=28"],
                           ["parallel.tensor=3", "train.sequence_length=33"],
                           "train.sequence_length=33 is over"),
    "batch": (["parallel.data=4"], ["parallel.data=8"],
              "train.global_batch=8 is not divisible by train.micro_batch x parallel.data = 2 x 8 ="
              " 16; global_batch may be 16"),
    "warm-up": (["optimizer.warmup_tokens=2399"], ["optimizer.warmup_tokens=2400"],
                "optimizer.warmup_tokens=2,400 is not under train.tokens=2,400"),
    "warm-up of what is trained": (  # eleven steps are nearer
        ["train.tokens=2521", "optimizer.warmup_tokens=2639"],
        ["train.tokens=2519", "optimizer.warmup_tokens=2400"], "2,400 is not under"),
    "a step that is kept": (["checkpoint.keep_at=[3, 10]"], ["checkpoint.keep_at=[3, 11]"],
                            "checkpoint.keep_at=[3, 11] names step 11, and the run ends at step "
                            "10"),
    "patience without validation": (
        ["data.train=a", "data.valid=b", "evaluate.patience=3"],
        ["data.train=a", "evaluate.patience=3"], "evaluate.patience=3 goes by the validation loss"),
    "best without validation": (
        ["data.train=a", "checkpoint.best=false"], ["data.train=a", "checkpoint.best=true"],
        "checkpoint.best=true goes by the validation loss, and data.valid names no data"),
    "offload": (["engine=deepspeed", "parallel.offload=true", "parallel.zero_stage=1"],
                ["engine=deepspeed", "parallel.offload=true", "parallel.zero_stage=0"],
                "parallel.offload=true needs sharded optimizer state, and parallel.zero_stage=0"),
    "offload's engine": (["engine=deepspeed", "parallel.offload=true"], ["parallel.offload=true"],
                         "parallel.offload=true needs engine=deepspeed, and engine=megatron"),
    "stages of ZeRO": (["engine=deepspeed", "parallel.zero_stage=2"], ["parallel.zero_stage=2"],
                       "parallel.zero_stage=2 needs engine=deepspeed, and engine=megatron"),
    "ZeRO of Megatron": (["parallel.zero_stage=0"], ["parallel.zero_stage=3"],
                         "parallel.zero_stage=3 needs engine=deepspeed"),
    "pipeline's engine": (["engine=megatron", "parallel.pipeline=2"],
                          ["engine=deepspeed", "parallel.pipeline=2"],
                          "engine=deepspeed has no pipeline stages here, and parallel.pipeline=2"),
    "reached": (["sparsity.reached=1.0"], ["sparsity.reached=0.5"],
                "sparsity.reached=0.5 is set by the run itself"),
    "data": (["data.train=a"], ["data.train=a", "data.blend=[{path: b, weight: 1}]"],
             "data.train and data.blend both name training data"),
    "weight or epochs": (["data.blend=[{path: b, weight: 1}]"], ["data.blend=[{path: b}]"],
                         "data.blend: b needs either a weight or epochs"),
    "not both": (["data.blend=[{path: b, epochs: 1}]"],
                 ["data.blend=[{path: b, epochs: 1, weight: 1}]"], "either a weight or epochs"),
    "one form": (["data.blend=[{path: b, weight: 1}, {path: c, weight: 2}]"],
                 ["data.blend=[{path: b, weight: 1}, {path: c, epochs: 2}]"],
                 "data.blend mixes weights and epochs"),
    "attention": (["kernels.attention=transformer_engine"],
                  ["kernels.attention=transformer_engine", "data.reset_attention=true"],
                  "data.reset_attention=true needs kernels.attention=sdpa, and it is transformer"),
    "a graph's engine": ([GRAPH], [GRAPH, "engine=deepspeed"], "here is engine=deepspeed"),
    "a graph's ranks": ([GRAPH], [GRAPH, "parallel.data=2"], "here is ranks=2"),
    "a graph's dropout": ([GRAPH], [GRAPH, "model.dropout=0.1"], "here is model.dropout=0.1"),
    "a graph's recomputation": ([GRAPH], [GRAPH, "train.recompute=full"],
                                "here is train.recompute=full"),
    "stages": ([SHARES.format(0.5, 0.5, 0, 0.5)], ["stages=[{share: 0.9999999, sparsity: 0.5}]"],
               "stages has one entry, and there is no border"),
    "shares": ([SHARES.format(0.4, 0.5, 0, 0.6000001)], [SHARES.format(0.4, 0.5, 0, 0.60001)],
               "must add up to 1"),
    "a stage of a step": ([SHARES.format(0.051, 0.5, 0, 0.949)],
                          [SHARES.format(0.049, 0.5, 0, 0.951)],
                          "stages.0.share=0.049 of 10 steps is no step"),
    "warm-up of a stage": ([SHARES.format(0.3, 0.5, 719, 0.7)],
                           [SHARES.format(0.3, 0.5, 720, 0.7)],
                           "stages.0.warmup_tokens=720 is not under the stage's 720 tokens"),
    "a border": ([SHARES.format(0.5, 0.5, 0, 0.5)], [SHARES.format(0.5, 0.75, 0, 0.5)],
                 "nothing says which are born; make the stage dense"),
    "decay": (["optimizer.decay_share=0.5", "optimizer.warmup_tokens=1200"],
              ["optimizer.decay_share=0.6", "optimizer.warmup_tokens=1200"],
              "begins before the warm-up's end at step 5"),
    "two sparsities": ([SHARES.format(0.5, 0.5, 0, 0.5)],
                       [SHARES.format(0.5, 0.5, 0, 0.5), "sparsity=0.5"],
                       "sparsity and stages both say what is sparse"),
    "patience": ([SHARES.format(0.5, 0.5, 0, 0.5), "evaluate.patience=0"],
                 [SHARES.format(0.5, 0.5, 0, 0.5), "evaluate.patience=1"],
                 "evaluate.patience=1 ends a run before its last stage"),
    "slices": (["model.ffn_hidden=300"], ["model.ffn_hidden=301"],
               "model.ffn_hidden=301 is not divisible by model.query_groups=6"),
    "masks move before they stop": (
        [*SET, "sparsity.update.start=0.3"], [*SET, "sparsity.update.start=0.5"],
        "start=0.5 is not under stop=0.5, so that no mask would move"),
    "pruning begins before it ends": (
        [*GMP, "sparsity.update.start=0.3"], [*GMP, "sparsity.update.start=0.5"],
        "start=0.5 is not under stop=0.5, so that nothing would be pruned"),
    "sparse and dense by turns": (
        [*ACDC, "sparsity.update.turn=0.65"], [*ACDC, "sparsity.update.turn=0.651"],
        "turn=0.651 is longer than start=0.1 to last_dense=0.75"),
    "a turn of a step": ([*ACDC, "sparsity.update.turn=0.1"], [*ACDC, "sparsity.update.turn=0.09"],
                         "sparsity.update.turn=0.09 of 10 steps is no step"),
    "parts of ACDC ascend": (
        [*ACDC, "sparsity.update.turn=0.1", "sparsity.update.stop=0.8"],
        [*ACDC, "sparsity.update.turn=0.1", "sparsity.update.stop=0.75"],
        "start=0.1, last_dense=0.75 and stop=0.75 must ascend"),
    "n of m": (["sparsity.pattern=n_m", "sparsity.level=0.25", "sparsity.n=3"],
               ["sparsity.pattern=n_m", "sparsity.level=0.25", "sparsity.n=4"],
               "n=4 of every m=4 leaves no zeros"),
    "groups": (["model.query_groups=3"], ["model.query_groups=4", "model.ffn_hidden=288"],
               "model.heads=6 is not divisible by model.query_groups=4"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(SIZES)
    return path


@pytest.mark.parametrize("name", EDGES)
def test_a_rule_at_its_edge(file, name):
    allowed, refused, said = EDGES[name]
    load_recipe(file, allowed)
    with pytest.raises(ValueError) as caught:
        load_recipe(file, refused)
    first, *rules = str(caught.value).splitlines()
    assert said in " ".join(rules) and len(rules) == 1


@pytest.mark.parametrize(("batch", "micro", "data", "near"), [
    (7, 2, 3, "global_batch may be 6 or 12"), (5, 2, 3, "global_batch may be 6"),
    (13, 2, 3, "global_batch may be 12 or 18"), (6, 2, 3, None), (18, 2, 3, None)])
def test_batches_near_one_that_cannot_be_cut(batch, micro, data, near):
    said = list(batch_violations(batch, micro, data))
    assert not said if near is None else said[0].endswith(near) and len(said) == 1


@pytest.mark.parametrize(("changes", "broken"), [
    ({}, 0), ({"mode": "sparse"}, 0), ({"revived": "normal"}, 0),
    ({"mode": "sparse", "revived": "normal"}, 1), ({"parallel": {"pipeline": 2}}, 1),
    ({"parallel": {"tensor": 2}}, 0), ({"parallel": {"data": 2}}, 0),
    ({"parallel": {"data": 3}}, 1), ({"parallel": {"data": 3, "pipeline": 2}}, 2)])
def test_rules_of_fine_tuning(changes, broken):
    recipe = Finetune.model_validate({
        "output": "run", "checkpoint": "run", "data": {"task": "e2e", "path": "x"},
        "train": {"global_batch": 8, "micro_batch": 4}, "optimizer": {"lr": 1e-4}, **changes})
    assert len(list(_finetune_violations(recipe))) == broken


def test_a_recipe_that_breaks_no_rule_is_told_of_none(file):
    assert not list(rule_violations(load_recipe(file)))
