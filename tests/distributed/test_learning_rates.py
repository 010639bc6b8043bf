"""Every group of weights has its learning rate in every part of a schedule, on every engine, and
after a resume in every part."""

import math

import pytest
from curves import close
from rate_cases import branched, in_parts, plain, spreads

pytestmark = pytest.mark.slow

# Two steps of warm-up, three at the peak, four of decay by 1 - sqrt(x) to a tenth of it, by hand.
SHARES = [0.5, 1.0, 1.0, 1.0, 1.0, *(0.1 + 0.9 * (1.0 - math.sqrt(x)) for x in (0.25, 0.5, 0.75)),
          0.1]
STEPS, PER_STEP = len(SHARES), 8 * 32
OPTIMIZER = {"lr": 1e-3, "embedding_lr": 8e-3, "norm_lr": 2e-3, "warmup_tokens": 2 * PER_STEP,
             "decay": "minus_sqrt", "decay_share": 4 / 9, "min_lr_ratio": 0.1}
SECTIONS = {"train": {"tokens": STEPS * PER_STEP}, "optimizer": OPTIMIZER,
            "parametrization": "density"}  # a quarter of the weights learns at four times the rate
PEAKS = {"linear": 4e-3, "embedding": 8e-3, "norm": 2e-3}
LAYOUTS = {
    "one": {}, "tp2": {"parallel": {"tensor": 2}}, "pp2": {"parallel": {"pipeline": 2}},
    **{f"zero {zero}": {"parallel": {"data": 2, "zero_stage": zero}} for zero in (0, 1)},
    **{f"deepspeed {zero}": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": zero}}
       for zero in (0, 1, 3)},
}
IN_EVERY_PART = [1, 4, 7, STEPS]


@pytest.fixture
def run(ranks, make_recipe):
    def run(name: str, stops: list[int]) -> dict:
        world = 1 if name == "one" else 2
        return ranks(world).run(in_parts, make_recipe(**SECTIONS, **LAYOUTS[name]), stops)
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_plain_pytorch_with_the_rates_computed_by_hand(run, ranks, make_recipe,
                                                                           name):
    reference = ranks(1).run(plain, make_recipe(**SECTIONS), PEAKS, SHARES)
    close(run(name, [STEPS])["curve"], reference, 2e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_have_their_rates_at_every_step_and_nothing_else(run, name):
    found = run(name, [STEPS])["rates"]
    wanted = [sorted({(0.1, PEAKS["linear"] * share), (0.1, PEAKS["embedding"] * share),
                      (0.0, PEAKS["norm"] * share)}) for share in SHARES]
    for step, (there, hand) in enumerate(zip(found, wanted, strict=True), 1):
        assert [wd for wd, _ in there] == [wd for wd, _ in hand]
        assert [lr for _, lr in there] == pytest.approx([lr for _, lr in hand], rel=1e-14)
        if 2 <= step <= 5:
            assert there == hand  # the peak, to the last digit


@pytest.mark.parametrize("name", ["pp2", "zero 1", "deepspeed 1", "deepspeed 3"])
def test_resumed_in_every_part_equals_straight(run, name):
    straight, resumed = run(name, [STEPS]), run(name, IN_EVERY_PART)
    assert resumed["rates"] == straight["rates"]
    assert resumed["curve"] == straight["curve"]


@pytest.mark.parametrize("name, at", [("zero 1", 1), ("one", 4), ("deepspeed 1", 4), ("pp2", 5),
                                      ("deepspeed 3", 5)])
def test_a_branch_of_a_longer_trunk_equals_a_straight_run(run, ranks, make_recipe, tmp_path, name,
                                                          at):
    straight = run(name, [STEPS])
    trunk = make_recipe(str(tmp_path / "trunk"), **SECTIONS | LAYOUTS[name] | {
        "train": {"tokens": 40 * PER_STEP},
        "optimizer": {**OPTIMIZER, "decay": "constant", "decay_share": 1.0}})
    words = [f"train.tokens={STEPS * PER_STEP}", "optimizer.decay=minus_sqrt",
             f"optimizer.decay_share={4 / 9}"]
    branch = make_recipe(str(tmp_path / "branch"), **SECTIONS | LAYOUTS[name])
    world = 1 if name == "one" else 2
    assert ranks(world).run(branched, trunk, words, branch, at) == straight


def test_mup_at_the_base_computes_what_standard_does_in_every_digit(ranks, make_recipe):
    rates = {"optimizer": {"embedding_lr": 8e-3, "norm_lr": 2e-3}}
    at_base = {"parametrization": "mup", "mup_base": {"hidden": 64, "density": 0.25}}
    found = ranks(1).run(in_parts, make_recipe(**rates, **at_base), [4])
    assert found == ranks(1).run(in_parts, make_recipe(**rates), [4])


def test_initial_spreads_are_those_of_the_groups(ranks, make_recipe):
    model = {"init_std": 0.02, "embedding_std": 0.1}
    found = ranks(1).run(spreads, make_recipe(**SECTIONS, model=model))
    for name, std in found.items():
        wanted = 0.1 if "embedding" in name else 0.02 * 2  # variance / density
        wanted /= math.sqrt(2 * 2) if "proj" in name or "fc2" in name else 1.0
        assert std == pytest.approx(wanted, rel=0.05), name
