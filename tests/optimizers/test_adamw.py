"""AdamW against its definition."""

from __future__ import annotations

import pytest
import torch

from megatron_spdf.optimizers.adamw import AdamW

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
