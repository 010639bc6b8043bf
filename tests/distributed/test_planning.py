"""What the planner predicts against what a step does: bytes of every buffer, bytes handed to every
collective, and the most bytes of activations alive, on every rank of nine layouts, 75% sparse and
on one rank dense, and of variants."""

import pytest
from cases import planned, planned_traffic
from harness import world_of

pytestmark = pytest.mark.slow

LAYOUTS = {
    "one": {},
    "tp2 sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "interleave": 2},
    "dp2 zero 1": {"data": 2},
    "dp2 zero 0": {"data": 2, "zero_stage": 0},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
    "tp2 dp2": {"tensor": 2, "data": 2},
    "pp2 dp2 interleaved": {"pipeline": 2, "data": 2, "interleave": 2},
}
# activations above the small change of a step
BIG = {"layers": 4, "hidden": 128, "heads": 4, "vocab_size": 300}
SP = {"parallel": LAYOUTS["tp2 sp"]}
RUNS = {"one, 0%": {"sparsity": 0.0}} | {
    f"{name}, 75%": {"parallel": layout} for name, layout in LAYOUTS.items()} | {
    "recompute selective": {"train": {"recompute": "selective", "micro_batch": 1}},
    "recompute full": {"train": {"recompute": "full", "micro_batch": 1}},
    "grouped queries": {"model": {**BIG, "query_groups": 2}},
    "a group a rank": {"model": {**BIG, "query_groups": 2}, "parallel": {"tensor": 2}},
    "micro-batch 4": {"train": {"micro_batch": 4}},
    "tp2 sp recompute full": SP | {"train": {"recompute": "full", "micro_batch": 1}},
    "chunked logits": {"train": {"micro_batch": 4}},
    "chunked logits bf16": {"train": {"micro_batch": 4, "precision": "bf16"}},
    "tp2 sp chunked logits": SP | {"train": {"micro_batch": 4}},
    "ste n_m, tp2 sp": SP | {"sparsity": {"level": 0.5, "pattern": "n_m", "algorithm": "ste"}},
    "top_kast, dp2": {"parallel": LAYOUTS["dp2 zero 1"],
                      "sparsity": {"level": 0.75, "algorithm": "top_kast"}},
    "tp2 sp bf16": SP | {"train": {"precision": "bf16", "micro_batch": 1}},
}
CHUNKED = 4 * 384 * 40  # 40 tokens of 128


@pytest.fixture(scope="module")
def step(ranks, make_recipe):
    """What is counted and predicted of a step, on every rank."""
    def of(name: str) -> list[dict]:
        recipe = make_recipe(**{"model": BIG, "train": {"micro_batch": 1}, **RUNS[name]})
        limit = {"logits_bytes": CHUNKED} if "chunked" in name else {}
        return ranks(world_of(recipe)).run_all(planned, recipe, **limit)
    return of


@pytest.mark.parametrize("name", RUNS)
def test_buffers(step, name):
    for there in step(name):
        assert there["held"] == there["predicted"]


@pytest.mark.parametrize("name", RUNS)
def test_traffic(step, name):
    for there in step(name):
        assert there["sent"] == there["predicted to be sent"]


# What is left out: the loss and its masks, (B, T) each, and the seeds of recomputation; with
# pipeline stages what they receive ahead of its use, which weighs in these small models, most where
# a chunk is one block.
@pytest.mark.parametrize("name", RUNS)
def test_activations(step, name):
    tolerance = 0.1 if "pp" in name else 0.02
    for rank, there in enumerate(step(name)):
        assert there["predicted to be alive"] == pytest.approx(there["alive"], rel=tolerance), rank


@pytest.mark.parametrize(("zero", "precision"),
                         [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_data_parallel_traffic_of_deepspeed(ranks, make_recipe, zero, precision):
    there = ranks(2).run(planned_traffic, make_recipe(
        engine="deepspeed", parallel={"data": 2, "zero_stage": zero},
        train={"precision": precision}))
    for key, predicted in there["predicted to be sent"].items():
        if key[0] in ("gradients", "parameters"):
            # its flags and norms are among them
            assert there["sent"][key] == pytest.approx(predicted, abs=16), key
