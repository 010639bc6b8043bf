"""Every figure of plans of recipes unlike each other, as they were when the closed forms were held
against buffers and steps: no change of a term goes unseen. `stored_plans.py` stores them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from stored_plans import (
    GPU,
    OVERVIEWS,
    RECIPES,
    STORED,
    TEXT,
    figures_of,
    overview_of,
    plain,
    recipe_of,
)

from megatron_spdf.planning.overview import Request, make_overview
from megatron_spdf.planning.render import render_overview
from megatron_spdf.sparsity.plan import Plan

FIGURES = json.loads(STORED.read_text())


def changes(stored: Any, found: Any, place: str = "") -> list[str]:
    """Places of stored figures that are others now; what is new is none."""
    if isinstance(stored, dict) and isinstance(found, dict):
        pairs = [(key, value, found.get(key)) for key, value in stored.items()]
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        pairs = [(i, *both) for i, both in enumerate(zip(stored, found, strict=True))]
    else:  # floats to rounding, which another release of Python may do otherwise
        same = stored == (pytest.approx(found, rel=1e-12) if isinstance(found, float) else found)
        return [] if same else [f"{place}: {stored} became {found}"]
    return [said for key, *both in pairs for said in changes(*both, f"{place}/{key}")]


@pytest.mark.parametrize("name", RECIPES)
def test_figures_of_a_layout(name):
    assert not changes(FIGURES["recipes"][name], plain(figures_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OVERVIEWS)))
def test_an_overview(number):
    found = overview_of(*OVERVIEWS[number])
    assert not changes(FIGURES["overviews"][number], plain(found))
    if number == 0:
        assert render_overview(found) + "\n" == TEXT.read_text()


def sentences(name: str, gpus: int, memory: float, **sections) -> list[str]:
    """What is said of a recipe that cannot be laid out."""
    recipe = recipe_of(name).model_copy(update=sections)
    gpu = replace(GPU, memory=memory * 2**30)
    with pytest.raises(ValueError) as refused:
        make_overview(Request(recipe, Plan.of(recipe), gpu, gpus, 0.45, "given"))
    return str(refused.value).split("\n  - ")


@pytest.mark.slow
def test_what_holds_a_run_that_does_not_fit():
    """The fewest of its GPUs, larger GPUs, and the least sparsity that does."""
    name = "16B, tp2 pp3 dp4"
    assert sentences(name, 3, 32) == [
        "no layout of 3 x six holds this run. The nearest, tensor 1 x pipeline 3 x data 1, needs "
        "52.2 GiB on stage 0 (micro-batch 1, recompute full), 22.7 GiB too much: 29.4 of a GPU's "
        "32.0 GiB can be counted on. What does hold it:",
        "6 x six (tensor 2 x pipeline 3 x data 1)",
        "3 x A100 (--gpu a100)", "3 x H100 PCIe (--gpu h100-pcie)", "3 x H100 (--gpu h100)",
        "3 x H200 (--gpu h200)", "3 x B200 (--gpu b200)", "3 x MI300X (--gpu mi300x)",
        "3 x six with sparsity=0.9"]
    little, *others = sentences(name, 24, 0.5)
    assert little.startswith(
        "no layout of 24 x six holds this run. The nearest, tensor 2 x pipeline 12 x data 1, needs "
        "11.4 GiB on stage 0 (micro-batch 1, recompute full), 11.0 GiB too much: 0.5 of a GPU's "
        "0.5 GiB can be counted on.")
    assert all(word.startswith("24 x ") and "(--gpu " in word for word in others)


def test_numbers_near_one_that_cannot_be_laid_out():
    assert sentences("16B, tp2 pp3 dp4", 35, 50) == [
        "35 GPUs cannot be laid out: train.global_batch=144 is not divisible by train.micro_batch "
        "x parallel.data = 1 x 35 = 35; global_batch may be 140 or 175. Numbers near it that can: "
        "32, 36"]
