"""An optimizer that lies outside the package, sgd_tenant.py, works wherever ours does."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import sgd_tenant
import yaml
from cases import cut, train
from sgd_cases import plain, put_back
from user_command import run_with

from megatron_spdf.model.parametrization import Parametrization
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.recipe.finetune import Finetune, training_recipe
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import load_recipe, make_recipe, save_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.settings import Sparsity

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.8}
DEEPSPEED = {"engine": "deepspeed"}
LAYOUTS = {
    "zero 0": {"parallel": {"data": 2, "zero_stage": 0}},
    "zero 1": {"parallel": {"data": 2}},
    "tp2": {"parallel": {"tensor": 2}},
    "pp2": {"parallel": {"pipeline": 2}},
    "deepspeed zero 0": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 0}},
    "deepspeed zero 1": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 1}},
    "deepspeed zero 2": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": DEEPSPEED | {"parallel": {"data": 2, "zero_stage": 3}},
}
CHAINS = {"over layouts": ["zero 0", "tp2", "zero 1", "pp2"],
          "over engines": ["zero 1", "deepspeed zero 1", "deepspeed zero 3", "deepspeed zero 2"]}


PLUGINS = "sgd_tenant"  # of the ranks


def check_against_plain(ranks, make_deep_recipe, curve: list[tuple[float, float]]) -> None:
    reference = ranks(1).run(plain, make_deep_recipe(optimizer=SGD), STEPS)
    for (loss, norm), (loss_plain, norm_plain) in zip(curve, reference, strict=True):
        assert loss == pytest.approx(loss_plain, abs=1e-5)
        assert norm == pytest.approx(norm_plain, rel=1e-4)  # a root of a sum over all weights
    assert curve[-1][0] < curve[0][0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_pytorchs_sgd(ranks, make_deep_recipe, name):
    there = ranks(2).run(train, make_deep_recipe(optimizer=SGD, **LAYOUTS[name]), STEPS)
    check_against_plain(ranks, make_deep_recipe, there["curve"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_planner_knows_its_bytes(ranks, make_deep_recipe, name):
    there = ranks(2).run(train, make_deep_recipe(optimizer=SGD, **LAYOUTS[name]), STEPS)
    padding = 0.03 if "deepspeed" in name else 0.0
    assert there["held"]["optimizer"] == pytest.approx(there["predicted"]["optimizer"], rel=padding)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", CHAINS.values(), ids=CHAINS)
def test_a_run_goes_on_at_other_layouts_and_on_other_engines(ranks, make_deep_recipe, layouts):
    chain = [make_deep_recipe(optimizer=SGD, **LAYOUTS[layout]) for layout in layouts]
    check_against_plain(ranks, make_deep_recipe, ranks(2).run(cut, chain, [1, 3, 4, STEPS]))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_state_that_is_put_back_is_the_one_that_was_read(ranks, make_deep_recipe, name, precision):
    there = ranks(2).run(put_back, make_deep_recipe(optimizer=SGD, **LAYOUTS[name],
                                                    train={"precision": precision}))
    fresh, trained, again = there["losses"]
    assert there["same"] and again == fresh != trained
    assert there["curves"][0] == there["curves"][1]


def test_one_state_takes_half_the_bytes_of_adams_two(recipe):
    adamw, sgd = recipe(), recipe(optimizer=SGD)
    held = [rank_bytes(r, Plan.of(r), 0, on_gpu=True) for r in (adamw, sgd)]
    assert held[0].moments == 2 * held[1].moments > 0
    assert held[0].parameters == held[1].parameters


def test_a_recipe_is_read_and_written_with_its_fields(recipe, tmp_path):
    made = recipe(optimizer=SGD)
    assert isinstance(made.optimizer, sgd_tenant.Sgd) and made.optimizer.momentum == 0.8
    save_recipe(made, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == made
    assert made.identity()["optimizer"]["momentum"] == 0.8
    assert not list(rule_violations(recipe(optimizer=SGD, parametrization="mup")))


def test_its_rates_under_mup_are_those_of_its_own_rule(recipe):
    """At twice the base width and a quarter of the weights."""
    base = {"hidden": 32}
    rates = {"mup": {True: 2.0 / (2.0 * 0.25), False: 2.0}, "density": {True: 4.0, False: 1.0}}
    for parametrization, wanted in rates.items():
        made = recipe(optimizer=SGD, parametrization=parametrization, sparsity=0.75, mup_base=base)
        rules = Parametrization(made, Plan.of(made))
        found = {w.linear: set() for w in made.model.weights()}
        for weight in made.model.weights():
            found[weight.linear].add(rules.peak(weight).limits(0.1)["max_lr"])
        assert found == {linear: {0.5 * rate} for linear, rate in wanted.items()}


def test_a_fine_tuning_recipe_has_its_fields(recipe):
    values = yaml.safe_load((ROOT / "configs/finetune/e2e.yaml").read_text())
    values["optimizer"] = {**SGD, "warmup_steps": 3}
    values |= {"checkpoint": "start", "data": {"task": "e2e", "path": "data"}}
    finetune = Finetune.model_validate(values)
    made = training_recipe(finetune, recipe(model={"max_positions": 512}).model, Sparsity(), 1000)
    assert isinstance(made.optimizer, sgd_tenant.Sgd) and made.optimizer.momentum == 0.8
    assert made.optimizer.warmup_tokens == 3 * made.tokens_per_step
    assert (finetune.optimizer.decay, made.optimizer.weight_decay) == ("linear", 0.01)


@pytest.mark.parametrize("words, said", [
    (["optimizer.name=sdg"], "optimizer.name='sdg': there is no optimizer 'sdg'; known: sgd, "),
    (["optimizer.momentun=0.5"], "did you mean optimizer.momentum?"),
    (["optimizer.beta1=0.5"],
     "unknown key optimizer.beta1 (value 0.5); optimizer.name=sgd has no such key, and adamw"),
    (["optimizer.momentum=2"], "optimizer.momentum=2: input should be less than 1")])
def test_bad_input_is_named(recipe, words, said):
    values = recipe(optimizer=SGD).model_dump()
    with pytest.raises(ValueError) as error:
        make_recipe(values, words, "recipe.yaml")
    assert said in str(error.value)


def test_another_optimizer_takes_what_both_know(recipe):
    values = recipe(optimizer={"beta2": 0.95}).model_dump()
    changed = make_recipe(values, ["optimizer.name=sgd", "optimizer.momentum=0.7"], "recipe.yaml")
    assert (changed.optimizer.momentum, changed.optimizer.lr) == (0.7, 1e-3)


@pytest.mark.parametrize("kind", [Recipe, Finetune])
def test_help_has_its_fields(kind):
    text = render_help(kind)
    assert "optimizer, name=sgd:  SGD with momentum" in text
    assert text.count("  optimizer.momentum ") == text.count("  optimizer.beta1 ") == 1
    assert text.count("  optimizer.lr ") == 1


run = partial(run_with, plugins=PLUGINS)


@pytest.mark.slow
def test_it_is_trained_and_inspected_from_the_command_line(make_recipe, tmp_path):
    values = make_recipe(str(tmp_path / "run"), optimizer=SGD, log={"every": 1})
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"]["warmup_tokens"] = 256
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode and "there is no optimizer 'sgd'; known: adamw" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = run(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "optimizer torch.SGD" in done.stdout
    looked = run(tmp_path, "tools/inspect_checkpoint.py", "run", "--verify", "--json")
    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout)["state"]["step"] == 5
