"""What is born while Adam goes on, against Adam with a step count for every value."""

from __future__ import annotations

import pytest
import torch

from megatron_spdf.optimizers.adamw import AdamW
from megatron_spdf.optimizers.newborn import AGE, newborn_of
from megatron_spdf.sparsity.algorithms.acdc import AcDc
from megatron_spdf.sparsity.algorithms.base import Births
from megatron_spdf.sparsity.algorithms.set import Set

RATE, VALUES, RAMP = 1e-2, 50, 10


class Run:
    """A parameter under the engines' optimizer, and in float64 by the definition.

    Attributes:
        first, second, ages: of the definition; `late`: those that were born.
    """

    def __init__(self, rule: str, **fields: float):
        self.settings, self.rule, self.steps = AdamW(lr=RATE, **fields), rule, 0
        self.parameter = torch.nn.Parameter(0.1 * torch.randn(VALUES))
        self.wanted = self.parameter.detach().double().clone()
        self.first, self.second, self.ages = torch.zeros(3, VALUES, dtype=torch.double)
        self.late = torch.zeros(VALUES, dtype=torch.bool)
        self.optimizer = self.settings.build([
            {"params": [self.parameter], "lr": RATE, "weight_decay": 0.1}])
        self.settings.start(self.optimizer, [self.parameter])
        if newborn := newborn_of(Set(newborn=rule, ramp=RAMP), self.settings):
            newborn.start(self.optimizer, [self.parameter])
            newborn.attach(self.optimizer, lambda: self.steps)

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """An update of both; the definition's, over the learning rate, without decay."""
        self.parameter.grad = gradient.clone()
        self.optimizer.step()
        self.steps += 1
        o, g = self.settings, gradient.double()
        self.ages += 1
        self.first = o.beta1 * self.first + (1 - o.beta1) * g
        self.second = o.beta2 * self.second + (1 - o.beta2) * g**2
        counts = self.ages if self.rule == "ages" else torch.full_like(self.ages, self.steps)
        update = self.first / (1 - o.beta1**counts) / (
            (self.second / (1 - o.beta2**counts)).sqrt() + o.eps)
        if self.rule == "ramp":
            update[self.late] *= (self.ages[self.late] / RAMP).clamp(max=1.0)
        self.wanted = self.wanted - RATE * (update + 0.1 * self.wanted)
        return update

    @torch.no_grad()
    def bear(self, born: torch.Tensor) -> None:
        self.parameter[born] = 0.0
        for name in (*self.settings.states, *([AGE] if self.rule != "plain" else [])):
            self.optimizer.state[self.parameter][name][born] = 0.0
        for tensor in (self.wanted, self.first, self.second, self.ages):
            tensor[born] = 0.0
        self.late[born] = True


@pytest.mark.parametrize("fields", [{"beta2": 0.95}, {}, {"beta1": 0.5, "beta2": 0.6},
                                    {"beta2": 0.0}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("rule", ["ages", "ramp", "plain"])
def test_updates_are_those_of_the_definition(rule, fields):
    torch.manual_seed(0)
    run = Run(rule, **fields)
    for step in range(1, 121):
        run.step(torch.randn(VALUES))
        # fp32, a rounding a step
        assert torch.allclose(run.parameter.double(), run.wanted, rtol=1e-5, atol=2e-6), step
        if step % 7 == 0:
            run.bear(torch.randperm(VALUES)[:10])


def test_a_parameter_of_several_chunks_is_corrected_whole(monkeypatch):
    monkeypatch.setattr("megatron_spdf.optimizers.newborn.CHUNK", 16)  # of 50 values
    test_updates_are_those_of_the_definition("ages", {})


def test_a_value_that_was_there_from_the_start_is_not_touched():
    torch.manual_seed(0)
    gradients, runs = torch.randn(30, VALUES), []
    for rule in ("ages", "ramp", "plain"):
        torch.manual_seed(1)
        runs.append(Run(rule))
        for gradient in gradients:
            runs[-1].step(gradient)
    for other in runs[:2]:
        assert torch.equal(other.parameter, runs[2].parameter)
        for name in AdamW.states:
            assert torch.equal(other.optimizer.state[other.parameter][name],
                               runs[2].optimizer.state[runs[2].parameter][name])


def test_first_updates_with_a_constant_gradient():
    """Plain ones are up to 6.6 times a steady one, with ages they are as large."""
    found = {}
    for rule in ("plain", "ages", "ramp"):
        run = Run(rule)
        run.steps, born = 20_000, torch.zeros(VALUES, dtype=torch.bool)
        run.settings.set_steps(run.optimizer, run.steps)
        if rule != "plain":
            run.optimizer.state[run.parameter][AGE][:] = run.steps
        for name in run.settings.states:  # steady
            run.optimizer.state[run.parameter][name][:] = 1.0
        run.first[:], run.second[:], run.ages[:] = 1.0, 1.0, run.steps
        born[:5] = True
        run.bear(born)
        found[rule] = [run.step(torch.ones(VALUES))[0].item() for _ in range(20)]
        assert (run.parameter.double() - run.wanted).abs().max() < 1e-5
    assert found["plain"][0] == pytest.approx(3.16, abs=0.01)
    assert max(found["plain"]) == pytest.approx(6.57, abs=0.01)
    assert found["ages"] == pytest.approx([1.0] * 20)
    assert found["ramp"][0] == pytest.approx(0.316, abs=1e-3)


def test_by_default_it_follows_from_the_largest_first_update():
    def rule(algorithm: Births, beta2: float) -> str | None:
        newborn = newborn_of(algorithm, AdamW(lr=1.0, beta2=beta2))
        return newborn and newborn.rule

    betas = (0.999, 0.98, 0.97, 0.95)
    assert [rule(Set(), beta2) for beta2 in betas] == ["ages", "ages", None, None]
    assert [rule(AcDc(), beta2) for beta2 in betas] == [None] * 4
    assert rule(Set(newborn="plain"), 0.999) is None
    assert rule(Set(newborn="ages"), 0.95) == "ages"
