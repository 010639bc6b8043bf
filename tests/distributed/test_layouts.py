"""Invariants 1, 3, 4 and 5: layouts change neither masks nor losses; state and traffic follow the
active weights."""

import math

import pytest
from curves import close
from harness import outcome, run_cases
from mup import MUP

pytestmark = pytest.mark.slow

STEPS, FEW = 20, 8  # of runs at every layout; of others
DENSITIES = [{"weights": "decoder.layers.0.*", "level": 0.5}, {"weights": "*.mlp.*", "level": 0.75}]
LAYOUTS = {
    1: {
        "zero 0": {"zero_stage": 0},
    },
    2: {
        "tp2": {"tensor": 2},
        "tp2 sp": {"tensor": 2, "sequence": True},
        "pp2": {"pipeline": 2},
        "pp2 interleaved": {"pipeline": 2, "interleave": 2},
        "dp2 zero 1": {"data": 2},
        "dp2 zero 0": {"data": 2, "zero_stage": 0},
    },
    4: {
        "tp2 pp2": {"tensor": 2, "pipeline": 2},
        "tp2 dp2": {"tensor": 2, "data": 2},
        "tp4": {"tensor": 4},
    },
}
NAMES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]


@pytest.fixture(scope="module")
def results(make_deep_recipe, tmp_path_factory):
    def group(world: int) -> dict[str, tuple[str, dict]]:
        # Two micro-batches a step for each replica.
        return {name: run(parallel=layout, train={"micro_batch": 4 // layout.get("data", 1)})
                for name, layout in LAYOUTS[world].items()}

    def train(**sections) -> tuple[str, dict]:
        return "train", {"recipe": make_deep_recipe(**sections), "steps": FEW}

    def run(**sections) -> tuple[str, dict]:
        return "train", {"recipe": make_deep_recipe(**sections), "steps": STEPS}

    one = group(1) | {
        "reference": run(),
        "recompute full": train(train={"recompute": "full"}),
        "recompute selective": train(train={"recompute": "selective"}),
        "micro-batch 2": train(train={"micro_batch": 2}),
        "grouped queries": train(model={"query_groups": 2}),
        "bf16": train(train={"precision": "bf16"}),
        "densified": ("densified", {"recipe": make_deep_recipe(), "steps": 3}),
        "mup": train(**MUP, sparsity=DENSITIES),
    }
    two = group(2) | {
        "grouped queries tp2": train(model={"query_groups": 2}, parallel={"tensor": 2}),
        "bf16 tp2": train(train={"precision": "bf16"}, parallel={"tensor": 2}),
        "bf16 dp2": train(train={"precision": "bf16"}, parallel={"data": 2}),
        "mup tp2 sp": train(**MUP, sparsity=DENSITIES, parallel={"tensor": 2, "sequence": True}),
        "mup pp2 interleaved": train(**MUP, sparsity=DENSITIES,
                                     parallel={"pipeline": 2, "interleave": 2}),
        "mup dp2": train(**MUP, sparsity=DENSITIES, parallel={"data": 2}),
        "dense dp2": train(sparsity=0.0, parallel={"data": 2}),
        "dense dp2 zero 0": train(sparsity=0.0, parallel={"data": 2, "zero_stage": 0}),
        "overlap": ("overlapped",
                    {"recipe": make_deep_recipe(parallel={"data": 2}), "steps": STEPS}),
        "overlap zero 0": ("overlapped",
                           {"recipe": make_deep_recipe(parallel={"data": 2, "zero_stage": 0}),
                                          "steps": STEPS}),
        "densified tp2": ("densified",
                          {"recipe": make_deep_recipe(parallel={"tensor": 2}), "steps": 3}),
    }
    directory = tmp_path_factory.mktemp("layouts")
    return {world: run_cases(world, cases, directory / str(world))
            for world, cases in ((1, one), (2, two), (4, group(4)))}


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_losses_are_the_same_at_every_layout(results, world, name):
    reference, there = outcome(results[1], "reference"), outcome(results[world], name)
    assert len(there["curve"]) == STEPS
    close(there["curve"], reference["curve"])
    assert there["valid"] == pytest.approx(reference["valid"], rel=1e-5)


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_every_rank_reports_the_same(results, world, name):
    curves = [outcome(results[world], name, rank)["curve"] for rank in range(world)]
    assert all(curve == curves[0] for curve in curves)


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_masks_are_the_same_at_every_layout(results, world, name):
    reference = outcome(results[1], "reference")["masks"]
    together = {}
    for rank in range(world):
        for chunk, mask in outcome(results[world], name, rank)["masks"].items():
            assert together.setdefault(chunk, mask) == mask
    assert together == reference
    assert len(reference) == 4 * 4 * 4  # layers, weights, chunks


@pytest.mark.parametrize("name", ["recompute full", "recompute selective", "micro-batch 2"])
def test_recomputation_and_micro_batches_change_no_loss(results, name):
    close(outcome(results[1], name)["curve"], outcome(results[1], "reference")["curve"][:FEW])


@pytest.mark.parametrize("name", ["mup tp2 sp", "mup pp2 interleaved", "mup dp2"])
def test_learning_rates_of_several_densities_are_the_same_at_every_layout(results, name):
    there, reference = outcome(results[2], name)["curve"], outcome(results[1], "mup")["curve"]
    assert len(there) == FEW
    close(there, reference)
    assert abs(there[-1][0] - outcome(results[1], "reference")["curve"][FEW - 1][0]) > 1e-2


@pytest.mark.parametrize("name", ["overlap", "overlap zero 0"])
def test_overlapping_traffic_with_compute_changes_no_loss(results, name):
    there, reference = outcome(results[2], name), outcome(results[1], "reference")
    close(there["curve"], reference["curve"])
    assert there["valid"] == pytest.approx(reference["valid"], rel=1e-5)


def test_grouped_queries_too(results):
    close(outcome(results[2], "grouped queries tp2")["curve"],
          outcome(results[1], "grouped queries")["curve"])


@pytest.mark.parametrize("name", ["bf16 tp2", "bf16 dp2"])
def test_bf16_layouts_agree_to_its_precision(results, name):
    # 8 bits of mantissa, and TP rounds partial sums: 2e-2 absolute on losses near 5.
    curve, reference = outcome(results[2], name)["curve"], outcome(results[1], "bf16")["curve"]
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in reference], abs=2e-2)


def test_training_learns(results):
    curve = outcome(results[1], "reference")["curve"]
    # and not 384, the rows of the embedding
    assert curve[0][0] == pytest.approx(math.log(300), rel=0.02)
    assert curve[-1][0] < curve[0][0] - 0.5


@pytest.mark.parametrize(("world", "name"), [(1, "reference"), *NAMES])
def test_measured_sparsity_equals_the_plan(results, world, name):
    there = outcome(results[world], name)
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
    assert set(there["planned"].values()) == {0.75}


@pytest.mark.parametrize(("world", "name"),
                         [(1, "reference"), (1, "bf16"), (2, "dense dp2"), (2, "bf16 tp2"), *NAMES])
def test_predicted_bytes_are_those_of_the_buffers(results, world, name):
    for rank in range(world):
        there = outcome(results[world], name, rank)
        for what, held in there["held"].items():
            assert held == there["predicted"][what], what


@pytest.mark.parametrize("zero", [0, 1])
def test_bytes_of_the_sparse_layers_follow_the_active_weights(results, zero):
    name = f"dp2 zero {zero}"
    dense_name = "dense dp2" if zero else "dense dp2 zero 0"
    sparse, dense = outcome(results[2], name), outcome(results[2], dense_name)
    block = 4 * 12 * 64 * 64  # weights of the block matrices, all of them sparse
    others = sum(dense["parameters"].values()) - block
    share = 2 if zero else 1
    for what, each in {"parameters": 4, "gradients": 4, "optimizer": 8 / share}.items():
        ratio = (sparse["held"][what] - others * each) / (dense["held"][what] - others * each)
        assert 0.25 <= ratio <= 0.27, (what, ratio)


@pytest.mark.parametrize(("zero", "kinds"), [
    (1, ["reduce_scatter_tensor_coalesced", "allgather_into_tensor_coalesced"]),
    (0, ["allreduce_coalesced"]),
])
def test_traffic_of_the_sparse_layers_follows_the_active_weights(results, zero, kinds):
    sparse = outcome(results[2], f"dp2 zero {zero}")["traffic"]
    dense_there = outcome(results[2], "dense dp2" if zero else "dense dp2 zero 0")
    dense = dense_there["traffic"]
    others = 4 * (sum(dense_there["parameters"].values()) - 4 * 12 * 64 * 64)
    for kind in kinds:
        (key,) = [k for k in dense if k[0] == kind]
        ratio = (sparse[key] - others) / (dense[key] - others)
        assert 0.25 <= ratio <= 0.27, (kind, ratio)
    rest = [n for (kind, _), n in sparse.items() if kind not in kinds]
    assert sum(rest) < 1024  # nothing else of size is sent


@pytest.mark.parametrize(("world", "name"), [(1, "densified"), (2, "densified tp2")])
def test_densifying_changes_no_output(results, world, name):
    there = outcome(results[world], name)
    assert there["sparse"] == 16 and there["left"] == 0
    assert there["difference"] == 0.0
    assert there["marked"]
    assert there["zeros"] == pytest.approx([0.75] * 16)
