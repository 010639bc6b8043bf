"""The learning rate of a point of the run, by hand; what parameters have and what the log says."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_spdf.engine import common

TOKENS = [2560, 2450, 2670]  # of all of which a run makes ten steps of 256

SHAPES = {"constant": lambda done: 1.0, "linear": lambda done: 1.0 - done,
          "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2}


@pytest.mark.parametrize("decay", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 512])
@pytest.mark.parametrize("asked", TOKENS)
def test_warm_up_then_decay_to_a_share_of_the_peak(recipe, decay, ratio, warmup, asked):
    made = recipe(train={"tokens": asked}, optimizer={
        "lr": 1e-2, "decay": decay, "min_lr_ratio": ratio, "warmup_tokens": warmup})
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


# Shares of the way from the end to the peak, in four steps of decay: at a quarter, a half, three
# quarters and the end of it.
FALLS = {"linear": [0.75, 0.5, 0.25, 0.0],
         "cosine": [0.8535533905932737, 0.5, 0.14644660940672624, 0.0],
         "minus_sqrt": [0.5, 0.2928932188134524, 0.1339745962155614, 0.0],
         "exponential": [0.6817928305074290, 0.4142135623730950, 0.1892071150027210, 0.0]}


@pytest.mark.parametrize("decay", FALLS)
@pytest.mark.parametrize(("lr", "ratio"), [(1e-2, 0.2), (1e-2, 0.1), (1.7e-3, 0.3)])
@pytest.mark.parametrize("asked", TOKENS)
def test_a_decay_at_the_end_leaves_the_peak_as_it_is(recipe, decay, lr, ratio, asked):
    made = recipe(train={"tokens": asked}, optimizer={
        "lr": lr, "decay": decay, "decay_share": 0.4, "min_lr_ratio": ratio, "warmup_tokens": 512})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.0)
    scheduler, found = common.make_scheduler(made, optimizer), []
    for step in range(1, 11):
        common.set_learning_rate(scheduler, step * 256)
        found.append(optimizer.param_groups[0]["lr"])
    assert found[0] == lr / 2
    assert found[1:6] == [lr] * 5  # and not only nearly: a trunk of a constant rate has it so
    assert found[6:] == pytest.approx(
        [lr * (ratio + (1.0 - ratio) * fall) for fall in FALLS[decay]], rel=1e-14)
    assert common.learning_rate(scheduler) == found[-1]


@pytest.mark.parametrize(("share", "steps"), [(0.24, 2), (0.26, 3), (0.8, 8), (0.01, 0), (1.0, 8)])
def test_a_share_is_of_all_steps_and_of_whole_ones(recipe, share, steps):
    made = recipe(optimizer={"decay": "linear", "decay_share": share, "warmup_tokens": 512})
    assert made.decay_tokens == 256 * steps  # of ten; two are warm-up


@pytest.mark.parametrize("decay", ["minus_sqrt", "exponential"])
@pytest.mark.parametrize("asked", TOKENS)
def test_without_a_share_a_shape_begins_after_the_warm_up(recipe, decay, asked):
    made = recipe(train={"tokens": asked}, optimizer={
        "lr": 1e-2, "decay": decay, "min_lr_ratio": 0.0,
        "warmup_tokens": 512})  # eight steps of ten are left
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.0)
    scheduler = common.make_scheduler(made, optimizer)
    for step, fall in zip((4, 6, 8, 10), FALLS[decay], strict=True):
        common.set_learning_rate(scheduler, step * 256)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * fall, rel=1e-14, abs=1e-18)
