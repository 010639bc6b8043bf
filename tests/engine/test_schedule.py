"""The learning rate of a point of the run, by hand; what parameters have and what the log says."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_spdf.engine import common

SHAPES = {"constant": lambda done: 1.0, "linear": lambda done: 1.0 - done,
          "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2}


@pytest.mark.parametrize("decay", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 512])
def test_warm_up_then_decay_to_a_share_of_the_peak(recipe, decay, ratio, warmup):
    made = recipe(optimizer={"lr": 1e-2, "decay": decay, "min_lr_ratio": ratio,
                             "warmup_tokens": warmup})
    total, parameters = 2560, [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD([
        {"params": [p], "max_lr": 1e-2 * rate, "min_lr": 1e-2 * ratio * rate, "wd_mult": 1.0}
        for p, rate in zip(parameters, (1.0, 0.5), strict=True)], lr=0.0)
    scheduler = common.make_scheduler(made, optimizer)
    for tokens in (256, 512, 1024, 1792, 2560):
        common.set_learning_rate(scheduler, tokens)
        if tokens <= warmup:
            share = tokens / warmup
        else:
            share = ratio + (1 - ratio) * SHAPES[decay]((tokens - warmup) / (total - warmup))
            share = 1.0 if decay == "constant" else share
        assert common.learning_rate(scheduler) == pytest.approx(1e-2 * share)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [1e-2 * share, 5e-3 * share])
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
