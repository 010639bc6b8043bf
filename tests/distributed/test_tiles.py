"""Weights of tiles: the same at every layout, resumed at another, equal to masked dense weights;
and the way of a GPU, whose kernels multiply with the active tiles and add gradients to the fp32
buffers, in Triton's interpreter."""

import importlib.util

import pytest
from curves import close
from harness import outcome, run_cases

pytestmark = pytest.mark.slow
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                  reason="triton is not installed; PyTorch for CUDA brings it")

STEPS, FEW = 6, 2
TILE = {"level": 0.75, "pattern": "tile", "tile": 8}
SHORT = {"global_batch": 2, "micro_batch": 1, "sequence_length": 16}
# As small as kernels for tensor cores take them; at half density, so that two slices are balanced.
TILES = {"sparsity": {"level": 0.5, "pattern": "tile", "tile": 16},
         "model": {"layers": 1, "ffn_hidden": 64},
         "train": SHORT}
INTERPRETED = {1: ["tiles", "unstructured", "layer", "deepspeed"], 2: ["tp2", "tp2 sp", "zero 3"]}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")

    def train(**sections) -> tuple[str, dict]:
        return "train", {"recipe": make_recipe(model={"layers": 2}, **sections), "steps": STEPS}

    def triton(**sections) -> tuple[str, dict]:
        return "tile_cases.with_triton", {"recipe": make_recipe(**{**TILES, **sections}),
                                          "steps": FEW}

    def few(**sections) -> tuple[str, dict]:
        return "train", {"recipe": make_recipe(**{**TILES, **sections}), "steps": FEW}

    def cut(name: str, layouts: list[dict], stops: list[int]) -> tuple[str, dict]:
        recipes = [make_recipe(str(runs / name), sparsity=TILE, model={"layers": 2},
                               parallel=layout)
                   for layout in layouts]
        return "cut", {"recipes": recipes, "stops": stops}

    one = {
        "one": train(sparsity=TILE),
        "layer by layer": train(sparsity={**TILE, "dense_copy": "per_layer"}),
        "unstructured": train(),
        "unstructured layer by layer": train(sparsity={"level": 0.75, "dense_copy": "per_layer"}),
        "plain": ("against_plain",
                  {"recipe": make_recipe(sparsity=TILE, model={"layers": 1}, train=SHORT),
                                    "steps": 50}),
        "tiles": few(), "few unstructured": few(sparsity=0.75),
    }
    two = {
        "tp2": train(sparsity=TILE, parallel={"tensor": 2}),
        "tp2 sp layer by layer": train(sparsity={**TILE, "dense_copy": "per_layer"},
                                       parallel={"tensor": 2, "sequence": True}),
        "straight": cut("straight", [{"tensor": 2}], [STEPS]),
        "tp2 -> dp2 -> tp2 sp": cut("chain",
                                    [{"tensor": 2}, {"data": 2}, {"tensor": 2, "sequence": True}],
                                    [2, 4, STEPS]),
    }
    if importlib.util.find_spec("triton"):
        cut_twice = [make_recipe(str(runs / "triton"), **TILES)] * 2
        one |= {
            "triton tiles": triton(),
            "triton unstructured": triton(sparsity=0.75),
            "triton layer": triton(sparsity={"level": 0.75, "dense_copy": "per_layer"}),
            "triton deepspeed": triton(engine="deepspeed"),
            "triton plain": ("tile_cases.with_triton_against_plain",
                             {"recipe": make_recipe(**TILES), "steps": FEW}),
            "triton densified": ("tile_cases.with_triton_densified",
                                 {"recipe": make_recipe(**TILES), "steps": 1}),
            "triton cut": ("tile_cases.with_triton_cut", {"recipes": cut_twice, "stops": [1, FEW]}),
        }
        two |= {
            "triton tp2": triton(parallel={"tensor": 2}),
            "triton tp2 sp": triton(parallel={"tensor": 2, "sequence": True}),
            "triton zero 3": triton(engine="deepspeed", parallel={"data": 2, "zero_stage": 3}),
        }
    directory = tmp_path_factory.mktemp("tiles")
    return {world: run_cases(world, cases, directory / str(world)) for world,
            cases in ((1, one), (2, two))}


@pytest.mark.parametrize("name", ["tp2", "tp2 sp layer by layer"])
def test_masks_and_losses_are_the_same_at_every_layout(results, name):
    reference, together = outcome(results[1], "one"), {}
    for rank in range(2):
        there = outcome(results[2], name, rank)
        close(there["curve"], reference["curve"])
        together |= there["masks"]
    # layers, slices of each weight
    assert together == reference["masks"] and len(together) == 2 * (2 + 2 + 4 + 4)


def test_measured_sparsity_equals_the_plan(results):
    there = outcome(results[1], "one")
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)
    assert set(there["planned"].values()) == {0.75}


def test_predicted_bytes_are_those_of_the_buffers(results):
    for world, name in ((1, "one"), (2, "tp2")):
        there = outcome(results[world], name)
        assert there["held"] == there["predicted"]


def test_a_run_goes_on_at_another_layout(results):
    close(outcome(results[2], "tp2 -> dp2 -> tp2 sp"), outcome(results[2], "straight"))


def test_training_equals_plain_pytorch_on_masked_dense_weights(results):
    there = outcome(results[1], "plain")
    close(there["engine"], there["plain"], 2e-5)  # 50 steps of fp32 in another order
    assert there["weights apart"] < 1e-3  # about the learning rate, where a second moment is tiny


@pytest.mark.parametrize(("name", "reference"), [
    ("layer by layer", "one"), ("unstructured layer by layer", "unstructured")])
def test_expanding_layer_by_layer_changes_no_loss(results, name, reference):
    close(outcome(results[1], name)["curve"], outcome(results[1], reference)["curve"])


@needs_triton
@pytest.mark.parametrize(("world", "name"),
                         [(world, name) for world, names in INTERPRETED.items() for name in names])
def test_kernels_change_no_loss_and_no_mask(results, world, name):
    there = outcome(results[world], f"triton {name}")
    reference = outcome(results[1],
                        "few unstructured" if name in ("unstructured", "layer") else "tiles")
    close(there["curve"], reference["curve"])
    assert all(reference["masks"][slice] == mask for slice, mask in there["masks"].items())
    assert there["sparsity"] == pytest.approx(reference["planned"], abs=1e-12)
    assert "expand/compress triton" in there["choices"]


@needs_triton
def test_layers_multiply_as_the_recipe_says(results):
    products = {"tiles": "TileProduct", "unstructured": "NoneType", "layer": "Product",
                "deepspeed": "TileProduct"}
    assert {name: outcome(results[1], f"triton {name}")["products"] for name in products} == {
        name: {product} for name, product in products.items()}
    assert outcome(results[2], "triton zero 3")["products"] == {"NoneType"}
    assert "; tiles triton" in outcome(results[1], "triton tiles")["choices"]


@needs_triton
def test_training_with_kernels_equals_plain_pytorch_on_masked_dense_weights(results):
    there = outcome(results[1], "triton plain")
    close(there["engine"], there["plain"])


@needs_triton
def test_a_run_with_kernels_goes_on_from_its_checkpoint(results):
    close(outcome(results[1], "triton cut"), outcome(results[1], "tiles")["curve"])


@needs_triton
def test_densifying_gives_the_layers_back_their_dense_product(results):
    there = outcome(results[1], "triton densified")
    assert there["sparse"] == 4 and there["left"] == 0 and there["marked"]
    assert there["difference"] < 1e-5  # of losses near 6, summed in another order
    assert there["zeros"] == pytest.approx([0.5] * 4)
