"""Invariants 1, 3, 4 and 5: layouts change neither masks nor losses; state and traffic follow the
active weights."""

import math

import pytest
from cases import densified, overlapped, train
from curves import close, close_runs
from harness import world_of
from mup import MUP

pytestmark = pytest.mark.slow

STEPS, FEW = 20, 8  # of runs at every layout; of others
DENSITIES = [{"weights": "decoder.layers.0.*", "level": 0.5}, {"weights": "*.mlp.*", "level": 0.75}]
LAYOUTS = {
    "zero 0": {"zero_stage": 0},
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "interleave": 2},
    "dp2 zero 1": {"data": 2},
    "dp2 zero 0": {"data": 2, "zero_stage": 0},
    "tp2 pp2": {"tensor": 2, "pipeline": 2},
    "tp2 dp2": {"tensor": 2, "data": 2},
    "tp4": {"tensor": 4},
}
ZERO = {1: LAYOUTS["dp2 zero 1"], 0: LAYOUTS["dp2 zero 0"]}
at_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="module")
def run(ranks, make_deep_recipe):
    """What each rank gives of a run with these sections."""
    def trained(steps: int = FEW, function=train, **sections) -> list[dict]:
        recipe = make_deep_recipe(**sections)
        return ranks(world_of(recipe)).run_all(function, recipe, steps=steps)
    return trained


@pytest.fixture(scope="module")
def at(run):
    """The same at a layout, with two micro-batches a step for each replica."""
    return lambda layout: run(STEPS, parallel=layout,
                              train={"micro_batch": 4 // layout.get("data", 1)})


@pytest.fixture(scope="module")
def reference(run):
    return run(STEPS)[0]


@at_layouts
def test_losses_are_the_same_at_every_layout(at, reference, layout):
    there = at(layout)[0]
    assert len(there["curve"]) == STEPS
    close_runs(there, reference)


@at_layouts
def test_every_rank_reports_the_same(at, layout):
    curves = [there["curve"] for there in at(layout)]
    assert all(curve == curves[0] for curve in curves)


@at_layouts
def test_masks_are_the_same_at_every_layout(at, reference, layout):
    together = {}
    for there in at(layout):
        for chunk, mask in there["masks"].items():
            assert together.setdefault(chunk, mask) == mask
    assert together == reference["masks"]
    assert len(together) == 4 * 4 * 4  # layers, weights, chunks


@pytest.mark.parametrize("change", [{"recompute": "full"}, {"recompute": "selective"},
                                    {"micro_batch": 2}], ids=str)
def test_recomputation_and_micro_batches_change_no_loss(run, reference, change):
    close(run(train=change)[0]["curve"], reference["curve"][:FEW])


@pytest.mark.parametrize("name", ["tp2 sp", "pp2 interleaved", "dp2 zero 1"])
def test_learning_rates_of_several_densities_are_the_same_at_every_layout(run, reference, name):
    there = run(**MUP, sparsity=DENSITIES, parallel=LAYOUTS[name])[0]["curve"]
    assert len(there) == FEW
    close(there, run(**MUP, sparsity=DENSITIES)[0]["curve"])
    assert abs(there[-1][0] - reference["curve"][FEW - 1][0]) > 1e-2


@pytest.mark.parametrize("zero", ZERO)
def test_overlapping_traffic_with_compute_changes_no_loss(ranks, make_deep_recipe, reference,
                                                          zero):
    there = ranks(2).run(overlapped, train, make_deep_recipe(parallel=ZERO[zero]), STEPS)
    close_runs(there, reference)


def test_grouped_queries_too(run):
    groups = {"query_groups": 2}
    close(run(model=groups, parallel={"tensor": 2})[0]["curve"], run(model=groups)[0]["curve"])


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"data": 2}], ids=str)
def test_bf16_layouts_agree_to_its_precision(run, layout):
    # 8 bits of mantissa, and TP rounds partial sums: 2e-2 absolute on losses near 5.
    bf16 = {"train": {"precision": "bf16"}}
    curve, reference = run(**bf16, parallel=layout)[0]["curve"], run(**bf16)[0]["curve"]
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in reference], abs=2e-2)


def test_training_learns(reference):
    curve = reference["curve"]
    # and not 384, the rows of the embedding
    assert curve[0][0] == pytest.approx(math.log(300), rel=0.02)
    assert curve[-1][0] < curve[0][0] - 0.5


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["one", *LAYOUTS])
def test_measured_sparsity_equals_the_plan(at, layout):
    there = at(layout)[0]
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
    assert set(there["planned"].values()) == {0.75}


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["one", *LAYOUTS])
def test_predicted_bytes_are_those_of_the_buffers(at, layout):
    for there in at(layout):
        assert there["held"] == there["predicted"]


@pytest.mark.parametrize("sections", [
    {"train": {"precision": "bf16"}},
    {"train": {"precision": "bf16"}, "parallel": {"tensor": 2}},
    {"sparsity": 0.0, "parallel": {"data": 2}}], ids=str)
def test_predicted_bytes_of_bf16_and_dense_runs_are_too(run, sections):
    for there in run(**sections):
        assert there["held"] == there["predicted"]


@pytest.mark.parametrize("zero", ZERO)
def test_bytes_of_the_sparse_layers_follow_the_active_weights(at, run, zero):
    sparse, dense = at(ZERO[zero])[0], run(sparsity=0.0, parallel=ZERO[zero])[0]
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
def test_traffic_of_the_sparse_layers_follows_the_active_weights(at, run, zero, kinds):
    sparse, there = at(ZERO[zero])[0]["traffic"], run(sparsity=0.0, parallel=ZERO[zero])[0]
    dense, others = there["traffic"], 4 * (sum(there["parameters"].values()) - 4 * 12 * 64 * 64)
    for kind in kinds:
        (key,) = [k for k in dense if k[0] == kind]
        ratio = (sparse[key] - others) / (dense[key] - others)
        assert 0.25 <= ratio <= 0.27, (kind, ratio)
    rest = [n for (kind, _), n in sparse.items() if kind not in kinds]
    assert sum(rest) < 1024  # nothing else of size is sent


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=str)
def test_densifying_changes_no_output(run, layout):
    there = run(3, densified, parallel=layout)[0]
    assert there["sparse"] == 16 and there["left"] == 0
    assert there["difference"] == 0.0
    assert there["marked"]
    assert there["zeros"] == pytest.approx([0.75] * 16)
