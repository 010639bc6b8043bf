"""What a training step does beside matrix products: how often the host waits for the device,
fusions, Adam's form, and the micro-batch that a run chooses for itself."""

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow

STEPS = 4
DROPOUT = {"model": {"dropout": 0.1}}
AUTO = {"model": {"dropout": 0.1, "layers": 2},
        "train": {"tokens": 8 * 32 * 4, "micro_batch": "auto"},
        "optimizer": {"warmup_tokens": 256}, "log": {"every": 1}, "checkpoint": {"every": 2}}
STAGES = [{"share": 0.5, "sparsity": 0.75}, {"share": 0.5, "sparsity": 0.0}]


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    one = {
        "waits": ("step_cases.waits", {"recipe": make_recipe()}),
        "waits bf16": ("step_cases.waits", {"recipe": make_recipe(train={"precision": "bf16"})}),
        "fused": ("step_cases.fused", {"recipe": make_recipe(), "steps": STEPS}),
        "unfused": ("train", {"recipe": make_recipe(), "steps": STEPS}),
        "fused dropout": ("step_cases.fused", {"recipe": make_recipe(**DROPOUT), "steps": STEPS}),
        "unfused dropout": ("train", {"recipe": make_recipe(**DROPOUT), "steps": STEPS}),
        "masked peer": ("step_cases.masked_peer", {"recipe": make_recipe(sparsity=0.0)}),
        "adam": ("step_cases.adam", {"recipe": make_recipe()}),
        "adam deepspeed": ("step_cases.adam", {"recipe": make_recipe(engine="deepspeed")}),
    }
    runs = tmp_path_factory.mktemp("runs")

    def tuned(name: str, *layouts: dict, stops: list[int | None], **sections) -> tuple[str, dict]:
        recipes = [make_recipe(str(runs / name), **{**AUTO, **sections, "parallel": layout})
                   for layout in layouts]
        return "step_cases.tuned", {"recipes": recipes, "stops": stops,
                                    "beside": str(runs / f"{name} fixed")}

    one["tuned"] = tuned("one", {}, {}, stops=[2, None])
    one["tuned stages"] = tuned("stages", {}, stops=[None], sparsity=0.0, stages=STAGES)
    two = {
        # Sequence parallelism is not among them: Megatron-Core compares states of the CPU's random
        # numbers there.
        "waits tp2": ("step_cases.waits", {"recipe": make_recipe(parallel={"tensor": 2})}),
        "waits dp2": ("step_cases.waits", {"recipe": make_recipe(parallel={"data": 2})}),
        "tuned deepspeed": tuned("deepspeed", {"data": 2}, {"data": 2}, stops=[2, None],
                                 engine="deepspeed"),
        "tuned layouts": tuned("layouts", {"pipeline": 2}, {"tensor": 2}, {"pipeline": 2},
                               stops=[1, 1, None]),
    }
    directory = tmp_path_factory.mktemp("step")
    return {world: run_cases(world, cases, directory / str(world)) for world,
            cases in ((1, one), (2, two))}


@pytest.mark.parametrize(("world", "name"),
                         [(1, "waits"), (1, "waits bf16"), (2, "waits tp2"), (2, "waits dp2")])
def test_the_host_waits_once_a_step(results, world, name):
    for rank in range(world):
        assert outcome(results[world], name, rank) == {"step": {"tolist": 1},
                                                       "evaluation": {"tolist": 1}}


@pytest.mark.parametrize("kind", ["", " dropout"])
def test_fusions_change_no_loss(results, kind):
    fused, unfused = outcome(results[1], f"fused{kind}"), outcome(results[1],
                                                                  f"unfused{kind}")["curve"]
    assert [loss for loss, _ in fused] == pytest.approx([loss for loss, _ in unfused], rel=1e-6)
    assert [norm for _, norm in fused] == pytest.approx([norm for _, norm in unfused], rel=1e-5)


def test_the_peer_of_benchmarks_that_multiplies_masks_trains(results):
    found = outcome(results[1], "masked peer")
    assert min(found["norms"]) > 0.0
    assert found["zero"] and all(found["zero"]) and all(found["learnt"])


@pytest.mark.parametrize("name", ["adam", "adam deepspeed"])
def test_adam_is_fused(results, name):
    there = outcome(results[1], name)
    assert there["fused"] == {True}
    assert there["steps"] == {1.0}
    assert "optimizer torch.AdamW fused" in there["choices"]


@pytest.mark.parametrize(("world", "name"), [(1, "tuned"), (2, "tuned deepspeed")])
def test_trials_leave_no_trace(results, world, name):
    """Not even in dropout, nor in a start that goes on: bit for bit the run with the number that
    was chosen."""
    there = outcome(results[world], name)
    assert len(there["fixed"]["records"]) >= 4
    assert there["auto"]["records"] == there["fixed"]["records"]


def test_every_start_at_a_layout_takes_what_the_first_chose(results):
    assert len(outcome(results[1], "tuned")["chosen"]) == 1
    there = outcome(results[2], "tuned layouts")
    assert [(c["of"]["pipeline"], c["of"]["tensor"]) for c in there["chosen"]] == [(2, 1), (1, 2)]
    assert there["auto"]["codes"][-1] == 0
    stages = outcome(results[1], "tuned stages")
    assert [c["of"]["stage"] for c in stages["chosen"]] == [1, 2]
    assert stages["auto"]["codes"] == [0]


def test_the_fastest_of_all_trials_is_chosen(results):
    for entry in outcome(results[2], "tuned layouts")["chosen"]:
        assert [t["micro_batch"] for t in entry["trials"]] == [1, 2, 4]
        best = min(entry["trials"], key=lambda t: t["seconds"])
        assert entry["micro_batch"] == best["micro_batch"]
