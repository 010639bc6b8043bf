"""2:4 weights: the same at every layout, resumed at another, equal to masked dense weights; and the
way of a GPU, whose sparse tensor cores multiply with the values, with a stand-in for their
library."""

import pytest
from curves import close
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

STEPS, FEW = 6, 2
HALF = {"level": 0.5, "pattern": "2:4"}
SHORT = {"global_batch": 2, "micro_batch": 1, "sequence_length": 16}
# As narrow as two tensor-parallel ranks can multiply on sparse tensor cores: shards of multiples of
# 64.
WIDE = {"sparsity": HALF, "model": {"layers": 1, "hidden": 128, "ffn_hidden": 128}, "train": SHORT}
ON_LIBRARY = {1: ["library", "deepspeed"], 2: ["tp2", "tp2 sp", "zero 3"]}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")

    def train(sparsity=HALF, **sections) -> tuple[str, dict]:
        recipe = make_recipe(model={"layers": 2}, sparsity=sparsity, **sections)
        return "train", {"recipe": recipe, "steps": STEPS}

    def library(**sections) -> tuple[str, dict]:
        return "two_four_cases.with_library", {"recipe": make_recipe(**WIDE, **sections),
                                               "steps": FEW}

    def cut(case: str, name: str, layouts: list[dict], stops: list[int],
            **sections) -> tuple[str, dict]:
        return case, {"recipes": [make_recipe(str(runs / name), parallel=layout, **sections)
                                  for layout in layouts],
                      "stops": stops}

    small = {"sparsity": HALF, "model": {"layers": 2}}
    one = {
        "one": train(),
        "layer by layer": train({**HALF, "dense_copy": "per_layer"}),
        "plain": ("against_plain",
                  {"recipe": make_recipe(sparsity=HALF, model={"layers": 1}, train=SHORT),
                                    "steps": 50}),
        "wide": ("train", {"recipe": make_recipe(**WIDE), "steps": FEW}),
        "library": library(), "deepspeed": library(engine="deepspeed"),
        "library cut": cut("two_four_cases.with_library_cut", "library", [{}, {}], [1, FEW],
                           **WIDE),
    }
    two = {
        "two ranks": train(parallel={"tensor": 2}),
        "two ranks sp": train(parallel={"tensor": 2, "sequence": True}),
        "straight": cut("cut", "straight", [{"tensor": 2}], [STEPS], **small),
        "tp2 -> dp2": cut("cut", "chain", [{"tensor": 2}, {"data": 2}], [3, STEPS], **small),
        "tp2": library(parallel={"tensor": 2}),
        "tp2 sp": library(parallel={"tensor": 2, "sequence": True}),
        "zero 3": library(engine="deepspeed", parallel={"data": 2, "zero_stage": 3}),
    }
    directory = tmp_path_factory.mktemp("two_four")
    return {world: run_cases(world, cases, directory / str(world)) for world,
            cases in ((1, one), (2, two))}


@pytest.mark.parametrize("name", ["two ranks", "two ranks sp"])
def test_masks_and_losses_are_the_same_at_every_layout(results, name):
    reference, together = outcome(results[1], "one"), {}
    for rank in range(2):
        there = outcome(results[2], name, rank)
        close(there["curve"], reference["curve"])
        together |= there["masks"]
    assert together == reference["masks"] and len(together) == 2 * 4 * 4  # layers, weights, slices


def test_measured_sparsity_is_a_half(results):
    assert outcome(results[1],
                   "one")["sparsity"] == pytest.approx(outcome(results[1], "one")["planned"],
                                                       abs=1e-12)
    assert set(outcome(results[1], "one")["planned"].values()) == {0.5}


def test_predicted_bytes_are_those_of_the_buffers(results):
    for world, name in ((1, "one"), (2, "two ranks")):
        there = outcome(results[world], name)
        assert there["held"] == there["predicted"]


def test_a_run_goes_on_at_another_layout(results):
    close(outcome(results[2], "tp2 -> dp2"), outcome(results[2], "straight"))


def test_training_equals_plain_pytorch_on_masked_dense_weights(results):
    there = outcome(results[1], "plain")
    close(there["engine"], there["plain"], 2e-5)  # 50 steps of fp32 in another order
    assert there["weights apart"] < 1e-3  # about the learning rate, where a second moment is tiny


def test_expanding_layer_by_layer_changes_no_loss(results):
    close(outcome(results[1], "layer by layer")["curve"], outcome(results[1], "one")["curve"])


@pytest.mark.parametrize(("world", "name"),
                         [(world, name) for world, names in ON_LIBRARY.items() for name in names])
def test_sparse_tensor_cores_change_no_loss_and_no_mask(results, world, name):
    there, reference = outcome(results[world], name), outcome(results[1], "wide")
    close(there["curve"], reference["curve"])
    assert all(reference["masks"][slice] == mask for slice, mask in there["masks"].items())
    assert there["sparsity"] == pytest.approx(reference["planned"], abs=1e-12)
    assert "; 2:4 stand-in" in there["choices"]


def test_layers_multiply_with_the_values_but_under_zero_3(results):
    # A step has a forward and an input gradient of each weight for each of its two micro-batches.
    for world, name in ((1, "library"), (1, "deepspeed"), (2, "tp2"), (2, "tp2 sp")):
        there = outcome(results[world], name)
        assert (there["kinds"], there["products"]) == ({"TwoFourProduct"}, FEW * 2 * 2 * 4)
    there = outcome(results[2], "zero 3")
    assert (there["kinds"], there["products"]) == ({"NoneType"}, 0)


def test_a_run_on_sparse_tensor_cores_goes_on_from_its_checkpoint(results):
    close(outcome(results[1], "library cut"), outcome(results[1], "wide")["curve"])
