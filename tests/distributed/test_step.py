"""What a training step does beside matrix products: how often the host waits for the device,
fusions, Adam's form, and the micro-batch that a run chooses for itself."""

import pytest
from cases import train
from curves import close
from harness import world_of
from step_cases import adam, fused, gathers_by_part, masked_peer, tuned, updated, waits

pytestmark = pytest.mark.slow

STEPS = 4
AUTO = {"model": {"dropout": 0.1, "layers": 2},
        "train": {"tokens": 8 * 32 * 4, "micro_batch": "auto"},
        "optimizer": {"warmup_tokens": 256}, "log": {"every": 1}, "checkpoint": {"every": 2}}
STAGES = [{"share": 0.5, "sparsity": 0.75}, {"share": 0.5, "sparsity": 0.0}]


@pytest.fixture(scope="module")
def tune(ranks, make_recipe):
    """What comes of a run that chooses its micro-batch, started at each layout in turn and stopped
    after so many steps."""
    def run(layouts: list[dict], stops: list[int | None], **sections) -> dict:
        recipes = [make_recipe(**{**AUTO, **sections, "parallel": layout}) for layout in layouts]
        return ranks(world_of(recipes[0])).run(tuned, recipes, stops)
    return run


@pytest.fixture(scope="module")
def one(tune):
    return tune([{}, {}], [2, None])


@pytest.fixture(scope="module")
def of_layouts(tune):
    return tune([{"pipeline": 2}, {"tensor": 2}, {"pipeline": 2}], [1, 1, None])


# Sequence parallelism is not among them: Megatron-Core compares states of the CPU's random numbers
# there.
@pytest.mark.parametrize("sections", [{}, {"train": {"precision": "bf16"}},
                                      {"parallel": {"tensor": 2}}, {"parallel": {"data": 2}}],
                         ids=str)
def test_the_host_waits_once_a_step(ranks, make_recipe, sections):
    for there in ranks(world_of(sections)).run_all(waits, make_recipe(**sections)):
        assert there == {"step": {"tolist": 1}, "evaluation": {"tolist": 1}}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fusions_change_no_loss(ranks, make_recipe, dropout):
    recipe = make_recipe(model={"dropout": dropout})
    with_fusions = ranks(1).run(fused, recipe, STEPS)
    without = ranks(1).run(train, recipe, STEPS)["curve"]
    close(with_fusions, without, 1e-6)


def test_the_peer_of_benchmarks_that_multiplies_masks_trains(ranks, make_recipe):
    found = ranks(1).run(masked_peer, make_recipe(sparsity=0.0))
    assert min(found["norms"]) > 0.0
    assert found["zero"] and all(found["zero"]) and all(found["learnt"])


def test_the_benchmark_counts_deepspeeds_gathers_as_communication(ranks, make_recipe):
    parts = ranks(2).run(gathers_by_part, make_recipe(
        engine="deepspeed", model={"layers": 1}, parallel={"data": 2, "zero_stage": 3}))
    assert parts["made"] > 2 and parts["communication"] >= 0.1 * parts["made"]


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_adam_is_fused(ranks, make_recipe, engine):
    there = ranks(1).run(adam, make_recipe(engine=engine))
    assert there["fused"] == {True}
    assert there["steps"] == {1.0}
    assert "optimizer torch.AdamW fused" in there["choices"]


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_trials_leave_no_trace(one, tune, engine):
    """Not even in dropout, nor in a start that goes on: bit for bit the run with the number that
    was chosen."""
    there = one if engine == "megatron" else tune([{"data": 2}] * 2, [2, None], engine=engine)
    assert len(there["fixed"]["records"]) >= 4
    assert there["auto"]["records"] == there["fixed"]["records"]


def test_every_start_at_a_layout_takes_what_the_first_chose(one, of_layouts, tune):
    assert len(one["chosen"]) == 1
    assert [(c["of"]["pipeline"], c["of"]["tensor"]) for c in of_layouts["chosen"]] == [(2, 1),
                                                                                       (1, 2)]
    assert of_layouts["auto"]["codes"][-1] == 0
    stages = tune([{}], [None], sparsity=0.0, stages=STAGES)
    assert [c["of"]["stage"] for c in stages["chosen"]] == [1, 2]
    assert stages["auto"]["codes"] == [0]


def test_the_fastest_of_all_trials_is_chosen(of_layouts):
    for entry in of_layouts["chosen"]:
        assert [t["micro_batch"] for t in entry["trials"]] == [1, 2, 4]
        best = min(entry["trials"], key=lambda t: t["seconds"])
        assert entry["micro_batch"] == best["micro_batch"]


@pytest.mark.parametrize(("world", "sections"), [
    (1, {"optimizer": {"clip_grad": 0.1}}),
    (1, {"optimizer": {"clip_grad": 1e6}, "train": {"precision": "bf16"}}),
    (2, {"optimizer": {"clip_grad": 0.1}, "parallel": {"data": 2, "zero_stage": 1},
         "train": {"precision": "bf16"}})], ids=["clipped", "bf16, not clipped", "ZeRO-1"])
def test_an_update_launched_ahead_changes_no_digit(ranks, make_recipe, world, sections):
    """As on a GPU, where the host does not know yet whether the gradients are finite: two of the
    steps leave everything as it is, bias correction included."""
    recipe = make_recipe(sparsity=0.75, **sections)
    ahead, after = (ranks(world).run(updated, recipe, ahead) for ahead in (True, False))
    assert ahead == after
    assert [("skipped=True" in step) for step in ahead] == [n in (3, 5) for n in range(1, 8)]
