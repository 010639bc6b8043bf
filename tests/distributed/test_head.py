"""The LM head's loss, made chunk by chunk with its gradients: against float64, against
Megatron-Core's on whole logits, and the bytes it needs."""

import pytest
from cases import train
from harness import world_of
from head_cases import against_float64, as_megatron, peaks

pytestmark = pytest.mark.slow

MUP = {"parametrization": "mup", "mup_base": {"hidden": 32}}
SP = {"parallel": {"tensor": 2, "sequence": True}}
CHUNK = 10  # of 64 tokens


# bf16 has 8 bits of mantissa.
@pytest.mark.parametrize("world", [1, 2])
def test_loss_and_gradients_are_those_of_float64(ranks, make_recipe, world):
    recipe = make_recipe(parallel={"tensor": world})
    for rank, errors in enumerate(ranks(world).run_all(against_float64, recipe)):
        for (dtype, *case), (loss, of_input, of_weight) in errors.items():
            tolerance = 1e-6 if dtype == "torch.float32" else 1e-2
            assert max(loss, of_input, of_weight) < tolerance, (dtype, case, rank)


@pytest.mark.parametrize(
    "sections", [{}, MUP, {"train": {"precision": "bf16"}}, {"parallel": {"tensor": 2}}, SP,
                 MUP | SP], ids=["one", "mup", "bf16", "tp2", "tp2 sp", "tp2 sp mup"])
def test_chunks_give_what_megatron_core_gives_on_whole_logits(ranks, make_recipe, sections):
    recipe = make_recipe(**sections)
    for loss, gradients in ranks(world_of(recipe)).run_all(as_megatron, recipe, CHUNK):
        assert loss < (1e-3 if recipe["train"]["precision"] == "bf16" else 1e-6)
        assert gradients < (2e-2 if recipe["train"]["precision"] == "bf16" else 1e-5)


def test_logits_never_exist_as_a_whole(ranks, make_recipe):
    found = ranks(1).run(peaks, make_recipe())
    assert found["chunks"] < found["logits"] / 4
    assert found["logits"] < found["one chunk"] < 1.01 * found["megatron"]


def test_labels_are_smoothed_behind_pipeline_stages_too(ranks, make_recipe):
    """While training, and not in an evaluation."""
    smoothed = {"train": {"label_smoothing": 0.1}}
    one = ranks(1).run(train, make_recipe(**smoothed), steps=2)
    two = ranks(2).run(train, make_recipe(**smoothed, parallel={"pipeline": 2}), steps=2)
    assert [loss for loss, _ in two["curve"]] == pytest.approx([loss for loss, _ in one["curve"]],
                                                               rel=1e-5)
    assert two["valid"] == pytest.approx(one["valid"], rel=1e-5)
