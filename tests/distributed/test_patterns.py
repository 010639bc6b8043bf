"""Weights of tiles and of 2:4: the same at every layout, resumed at another, equal to masked dense
weights; and the way of a GPU, whose kernels multiply with the active weights alone and add
gradients to the fp32 buffers: Triton's in its interpreter, those of sparse tensor cores with a
stand-in for their library."""

import importlib.util

import pytest
from cases import against_plain, cut, densified, train
from curves import close
from harness import world_of
from kernel_cases import with_library, with_triton

pytestmark = pytest.mark.slow
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="triton is not installed; PyTorch for CUDA brings it")

STEPS, FEW = 6, 2
PATTERNS = {"tile": {"level": 0.75, "pattern": "tile", "tile": 8},
            "2:4": {"level": 0.5, "pattern": "2:4"}}
SLICES = {"tile": 2 + 2 + 4 + 4, "2:4": 4 * 4}  # in a layer
TP2, SP, DP2 = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"data": 2}
SHORT = {"global_batch": 2, "micro_batch": 1, "sequence_length": 16}
# As small as kernels for tensor cores take them; at half density, so that two slices are balanced.
TILES = {"sparsity": {"level": 0.5, "pattern": "tile", "tile": 16},
         "model": {"layers": 1, "ffn_hidden": 64}, "train": SHORT, "evaluate": {"batches": 1}}
# As narrow as two tensor-parallel ranks can multiply on sparse tensor cores: shards of multiples of
# 64.
WIDE = {"sparsity": PATTERNS["2:4"], "model": {"layers": 1, "hidden": 128, "ffn_hidden": 128},
        "train": SHORT, "evaluate": {"batches": 1}}
DEEPSPEED = {"engine": "deepspeed"}
ZERO_3 = {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}}

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(scope="module")
def run(ranks, make_recipe):
    """What each rank gives of a run with this sparsity at a layout."""
    def trained(sparsity, layout: dict | None = None) -> list[dict]:
        recipe = make_recipe(sparsity=sparsity, parallel=layout or {})
        return ranks(world_of(recipe)).run_all(train, recipe, steps=STEPS)
    return trained


@pytest.mark.parametrize("change", [{}, {"dense_copy": "per_layer"}], ids=["", "layer by layer"])
@pytest.mark.parametrize("layout", [TP2, SP], ids=["tp2", "tp2 sp"])
@each_pattern
def test_masks_and_losses_are_the_same_at_every_layout(run, pattern, layout, change):
    reference, together = run(PATTERNS[pattern])[0], {}
    for there in run(PATTERNS[pattern] | change, layout):
        close(there["curve"], reference["curve"])
        together |= there["masks"]
    assert together == reference["masks"] and len(together) == 2 * SLICES[pattern]


@each_pattern
def test_measured_sparsity_equals_the_plan(run, pattern):
    there = run(PATTERNS[pattern])[0]
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
    assert set(there["planned"].values()) == {PATTERNS[pattern]["level"]}


@each_pattern
def test_predicted_bytes_are_those_of_the_buffers(run, pattern):
    for layout in ({}, TP2):
        there = run(PATTERNS[pattern], layout)[0]
        assert there["held"] == there["predicted"]


@each_pattern
def test_a_run_goes_on_at_another_layout(ranks, make_recipe, pattern):
    chain = [make_recipe(sparsity=PATTERNS[pattern], parallel=layout) for layout in (TP2, DP2, SP)]
    close(ranks(2).run(cut, chain, [2, 4, STEPS]), ranks(2).run(cut, chain[:1], [STEPS]))


@each_pattern
def test_training_equals_plain_pytorch_on_masked_dense_weights(ranks, make_recipe, pattern):
    recipe = make_recipe(sparsity=PATTERNS[pattern], model={"layers": 1}, train=SHORT)
    there = ranks(1).run(against_plain, recipe, steps=50)
    close(there["engine"], there["plain"], 2e-5)  # 50 steps of fp32 in another order
    assert there["weights apart"] < 1e-3  # about the learning rate, where a second moment is tiny


@pytest.mark.parametrize("sparsity", [{"level": 0.75}, *PATTERNS.values()],
                         ids=["unstructured", *PATTERNS])
def test_expanding_layer_by_layer_changes_no_loss(run, sparsity):
    close(run({**sparsity, "dense_copy": "per_layer"})[0]["curve"], run(sparsity)[0]["curve"])


@pytest.fixture(scope="module")
def small(ranks, make_recipe):
    """What rank 0 gives of a case, its recipe and further arguments, by way of `with_triton` or
    `with_library` if one is named."""
    def run(way, case, sections: dict, *arguments):
        recipe = make_recipe(**sections)
        there = ranks(world_of(recipe))
        return there.run(way, case, recipe, *arguments) if way else there.run(case, recipe,
                                                                              *arguments)
    return run


@needs_triton
@pytest.mark.parametrize(("sections", "product"), [
    ({}, "TileProduct"), ({"sparsity": 0.75}, "NoneType"),
    ({"sparsity": {"level": 0.75, "dense_copy": "per_layer"}}, "Product"),
    (DEEPSPEED, "TileProduct"), ({"parallel": TP2}, "TileProduct"),
    ({"parallel": SP}, "TileProduct"), (ZERO_3, "NoneType")], ids=str)
def test_kernels_change_no_loss_and_no_mask(small, sections, product):
    there = small(with_triton, train, TILES | sections, FEW)
    level = 0.75 if "sparsity" in sections else TILES["sparsity"]
    same_runs(there, small(None, train, TILES | {"sparsity": level}, FEW))
    assert there["products"] == {product}
    assert "expand/compress triton" in there["choices"]
    assert product != "TileProduct" or "; tiles triton" in there["choices"]


@pytest.mark.parametrize(("sections", "product"), [
    ({}, "TwoFourProduct"), (DEEPSPEED, "TwoFourProduct"), ({"parallel": TP2}, "TwoFourProduct"),
    ({"parallel": SP}, "TwoFourProduct"), (ZERO_3, "NoneType")], ids=str)
def test_sparse_tensor_cores_change_no_loss_and_no_mask(small, sections, product):
    there, count = small(with_library, train, WIDE | sections, FEW)
    same_runs(there, small(None, train, WIDE, FEW))
    assert there["products"] == {product}
    assert "; 2:4 stand-in" in there["choices"]
    # A step has a forward and an input gradient of each weight for each of its two micro-batches,
    # an evaluation the forward.
    evaluations = len(there["valid"])
    assert count == (0 if sections == ZERO_3 else (2 * FEW + evaluations) * 2 * 4)


def same_runs(there: dict, reference: dict) -> None:
    close(there["curve"], reference["curve"])
    assert all(reference["masks"][slice] == mask for slice, mask in there["masks"].items())
    assert there["sparsity"] == pytest.approx(reference["planned"], abs=1e-12)


@needs_triton
def test_training_with_kernels_equals_plain_pytorch_on_masked_dense_weights(small):
    there = small(with_triton, against_plain, TILES, FEW)
    close(there["engine"], there["plain"])


@needs_triton
def test_a_run_with_kernels_goes_on_from_its_checkpoint(ranks, make_recipe, small):
    found = ranks(1).run(with_triton, cut, [make_recipe(**TILES)] * 2, [1, FEW])
    close(found, small(None, train, TILES, FEW)["curve"])


def test_a_run_on_sparse_tensor_cores_goes_on_from_its_checkpoint(ranks, make_recipe, small):
    found, _ = ranks(1).run(with_library, cut, [make_recipe(**WIDE)] * 2, [1, FEW])
    close(found, small(None, train, WIDE, FEW)["curve"])


@needs_triton
def test_densifying_gives_the_layers_back_their_dense_product(small):
    there = small(with_triton, densified, TILES, 1)
    assert there["sparse"] == 4 and there["left"] == 0 and there["marked"]
    assert there["difference"] < 1e-5  # of losses near 6, summed in another order
    assert there["zeros"] == pytest.approx([0.5] * 4)
