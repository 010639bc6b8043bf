"""The LM head's loss, made chunk by chunk with its gradients: against float64, against
Megatron-Core's on whole logits, and the bytes it needs."""

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

MUP = {"parametrization": "mup", "mup_base": {"hidden": 32}}
MODELS = {
    1: {"one": {}, "mup": MUP, "bf16": {"train": {"precision": "bf16"}}},
    2: {"tp2": {"parallel": {"tensor": 2}}, "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
        "tp2 sp mup": {**MUP, "parallel": {"tensor": 2, "sequence": True}}},
}
CHUNK = 10  # of 64 tokens


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    groups = {world: {name: ("head_cases.as_megatron",
                             {"recipe": make_recipe(**sections), "chunk": CHUNK})
                      for name, sections in models.items()} for world, models in MODELS.items()}
    for world, cases in groups.items():
        cases["float64"] = ("head_cases.against_float64",
                            {"recipe": make_recipe(parallel={"tensor": world})})
    for world, layout in ((1, {}), (2, {"pipeline": 2})):
        groups[world]["smoothed"] = ("train", {"steps": 2, "recipe": make_recipe(
            parallel=layout, train={"label_smoothing": 0.1})})
    groups[1]["peaks"] = ("head_cases.peaks", {"recipe": make_recipe()})
    directory = tmp_path_factory.mktemp("head")
    return {world: run_cases(world, cases, directory / str(world)) for world,
            cases in groups.items()}


# bf16 has 8 bits of mantissa.
@pytest.mark.parametrize("world", [1, 2])
def test_loss_and_gradients_are_those_of_float64(results, world):
    for rank in range(world):
        for (dtype, *case), (loss, of_input, of_weight) in outcome(results[world], "float64",
                                                                   rank).items():
            tolerance = 1e-6 if dtype == "torch.float32" else 1e-2
            assert max(loss, of_input, of_weight) < tolerance, (dtype, case, rank)


@pytest.mark.parametrize(("world", "name"),
                         [(world, name) for world, models in MODELS.items() for name in models])
def test_chunks_give_what_megatron_core_gives_on_whole_logits(results, world, name):
    for rank in range(world):
        loss, gradients = outcome(results[world], name, rank)
        assert loss < (1e-3 if name == "bf16" else 1e-6)
        assert gradients < (2e-2 if name == "bf16" else 1e-5)


def test_logits_never_exist_as_a_whole(results):
    found = outcome(results[1], "peaks")
    assert (
        found["chunks"]
        < found["logits"] / 4
        < found["logits"]
        < found["one chunk"]
        < 1.01 * found["megatron"]
    )


def test_labels_are_smoothed_behind_pipeline_stages_too(results):
    """While training, and not in an evaluation."""
    one, two = outcome(results[1], "smoothed"), outcome(results[2], "smoothed")
    assert [loss for loss, _ in two["curve"]] == pytest.approx([loss for loss, _ in one["curve"]],
                                                               rel=1e-5)
    assert two["valid"] == pytest.approx(one["valid"], rel=1e-5)
