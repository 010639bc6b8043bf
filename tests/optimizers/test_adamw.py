"""AdamW against its definition."""

from __future__ import annotations

import pytest
import torch

from megatron_spdf.optimizers.adamw import AdamW
from megatron_spdf.optimizers.base import Optimizer

STEPS = 3


def by_definition(start: torch.Tensor, gradients: list[torch.Tensor], o: AdamW) -> torch.Tensor:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    weight, first, second = start.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        first = o.beta1 * first + (1 - o.beta1) * gradient
        second = o.beta2 * second + (1 - o.beta2) * gradient**2
        rate = first / (1 - o.beta1**t) / ((second / (1 - o.beta2**t)).sqrt() + o.eps)
        weight = weight - o.lr * (rate + o.weight_decay * weight)
    return weight


@pytest.mark.parametrize("fields", [{}, {"beta1": 0.5}, {"beta2": 0.6}, {"eps": 0.3},
                                    {"weight_decay": 2.0}], ids=str)
@pytest.mark.parametrize("stop", [STEPS, 1])
def test_updates_are_those_of_its_definition(fields, stop):
    """Also where its state was put into another one after some updates."""
    settings, draw = AdamW(lr=0.1, **fields), torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=draw)
    gradients = [torch.randn(7, generator=draw) for _ in range(STEPS)]
    master, state, steps = start.clone(), {}, 0
    for first, last in ((0, stop), (stop, STEPS)):
        parameter = torch.nn.Parameter(master.clone())
        optimizer = settings.build([{"params": [parameter], "lr": settings.lr,
                                     "weight_decay": settings.weight_decay}])
        settings.start(optimizer, [parameter])
        for name in state:
            optimizer.state[parameter][name].copy_(state[name])
        settings.set_steps(optimizer, steps)
        for gradient in gradients[first:last]:
            parameter.grad = gradient.clone()
            optimizer.step()
            steps += 1
        master = parameter.detach()
        state = {name: optimizer.state[parameter][name] for name in settings.states}
    wanted = by_definition(start, gradients, settings)
    assert torch.allclose(master.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"beta1": 0.5, "beta2": 0.6, "eps": 0.3}], ids=str)
def test_engines_are_given_the_recipes_numbers(fields):
    from megatron.core.optimizer import OptimizerConfig

    settings = AdamW(lr=0.1, weight_decay=2.0, **fields)
    wanted = (settings.beta1, settings.beta2, settings.eps)
    config = OptimizerConfig(**settings.megatron_options())
    assert (config.optimizer, config.adam_beta1, config.adam_beta2, config.adam_eps) == (
        "adam", *wanted)
    given = {key: value for key, (_, value) in settings.deepspeed_options().items()}
    assert given == {"type": "AdamW", "params.lr": 0.1, "params.weight_decay": 2.0,
                     "params.betas": list(wanted[:2]), "params.eps": wanted[2]}


def test_state_is_counted_saved_and_started_from_zero():
    settings = AdamW(lr=0.1)
    assert settings.saved == ("param", "exp_avg", "exp_avg_sq") and settings.state_bytes == 8
    master = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = settings.build([{"params": [master]}])
    settings.start(optimizer, [master])
    state = optimizer.state[master]
    assert set(state) == {"exp_avg", "exp_avg_sq", "step"} and state["step"] == 0
    assert all(not state[name].any() and state[name].shape == (3,) for name in settings.states)
    assert all(group["fused"] for group in optimizer.param_groups)
    slow = torch.optim.AdamW([master])  # as Megatron-Core makes it
    settings.start(slow, [master])
    assert all(group["fused"] for group in slow.param_groups)
    settings.set_steps(optimizer, 7)
    assert state["step"] == 7.0 and state["step"].dtype == torch.float32


def test_an_optimizer_that_counts_by_groups_is_set_by_groups():
    class Other(torch.optim.SGD):
        pass

    master = torch.nn.Parameter(torch.ones(2))
    optimizer = Other([master], lr=0.1)
    AdamW(lr=0.1).set_steps(optimizer, 5)
    assert [group["step"] for group in optimizer.param_groups] == [5]
    assert not optimizer.state[master]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.5, 0.5), (0.0, 0.99)])
def test_the_largest_first_update_is_that_of_a_simulation(betas):
    """A constant gradient of 1 under a step count at which nothing is corrected."""
    first = second = largest = 0.0
    for _ in range(999):
        first = betas[0] * first + (1 - betas[0])
        second = betas[1] * second + (1 - betas[1])
        largest = max(largest, first / second**0.5)
    found = AdamW(lr=0.1, beta1=betas[0], beta2=betas[1]).largest_first_updates
    assert found == pytest.approx(largest, rel=1e-9)


def test_under_mup_rates_go_by_the_growth():
    settings = AdamW(lr=0.1)
    for linear, width, growth in ((True, 4.0, 2.0), (False, 4.0, 1.0), (True, 8.0, 0.5)):
        assert settings.mup_rate(linear, width, growth) == 1.0 / growth


def test_an_optimizer_of_few_words_has_the_defaults_of_the_seam():
    class Plain(Optimizer):
        states = ("buffer",)
        title = "Plain"

    settings = Plain(lr=0.5, weight_decay=0.25)
    assert settings.megatron_options() is None and settings.largest_first_updates == 1.0
    assert settings.deepspeed_options() == {
        "type": ("optimizer.name", "Plain"), "params.lr": ("optimizer.lr", 0.5),
        "params.weight_decay": ("optimizer.weight_decay", 0.25)}
    assert (settings.saved, settings.state_bytes) == (("param", "buffer"), 4)
    with pytest.raises(ValueError, match="optimizer.name=adamw has no rule for"):
        settings.mup_rate(True, 1.0, 1.0)
    with pytest.raises(NotImplementedError):
        settings.build([])
