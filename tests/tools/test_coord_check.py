"""tools/coord_check.py: models of every width and density under both parametrizations, and their
sizes at the last step."""

from __future__ import annotations

import json
from pathlib import Path

import coord_check
import numpy as np
import pytest

from megatron_spdf.evaluation import coordinate_check
from megatron_spdf.parallel import fake_cuda

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "configs/pretrain/gpt_10m.yaml")


@pytest.fixture
def check(monkeypatch, capsys):
    """The tool; returns what it prints as JSON, and the recipes and steps that it measured."""
    measured = []

    def sizes(recipe, steps):
        measured.append((recipe, steps))
        size = recipe.model.hidden**0.5 * (1.0 - recipe.sparsity.level)**0.25
        return [{"logits": 99.0}] * (steps - 1) + [{"logits": size}]

    monkeypatch.setattr(coordinate_check, "activation_sizes", sizes)
    monkeypatch.setattr(fake_cuda, "install", lambda: None)

    def check(*words: str):
        assert coord_check.main([RECIPE, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out), measured
    return check


def test_every_width_is_dense_and_every_density_of_the_base_width(check):
    found, measured = check("--widths", "64", "128", "512", "--sparsities", "0", "0.75", "--steps",
                            "3", "optimizer.lr=0.5")
    base = coord_check.load_recipe(RECIPE)
    head, narrow = base.model.hidden // base.model.heads, base.mup_base.hidden
    assert [(r.parametrization, r.model.hidden, r.sparsity.level) for r, _ in measured] == [
        (rule, *cell) for rule in ("standard", "mup")
        for cell in ((64, 0.0), (128, 0.0), (512, 0.0), (narrow, 0.0), (narrow, 0.75))]
    for recipe, steps in measured:
        model = recipe.model
        assert steps == 3 and recipe.optimizer.lr == 0.5
        assert model.heads == model.query_groups == model.hidden // head
        assert model.ffn_hidden == 4 * model.hidden
    for rule in ("standard", "mup"):
        sizes = found["sizes"][rule]
        assert {float(k): v["logits"] for k, v in sizes["width"].items()} == pytest.approx(
            {width: width**0.5 for width in (64, 128, 512)})
        assert {float(k): v["logits"] for k, v in sizes["density"].items()} == pytest.approx(
            {1.0: narrow**0.5, 0.25: narrow**0.5 * 0.25**0.25})
        for what, slope in (("width", 0.5), ("density", 0.25)):
            x, y = zip(*((float(k), v["logits"]) for k, v in sizes[what].items()), strict=True)
            assert np.polyfit(np.log2(x), np.log2(y), 1)[0] == pytest.approx(slope)
            assert found["slopes"][rule][what] == {"logits": pytest.approx(slope)}


def test_widths_densities_and_steps_that_nobody_gives(check):
    found, measured = check()
    assert list(map(int, found["sizes"]["mup"]["width"])) == [64, 128, 256, 512, 1024]
    assert list(map(float, found["sizes"]["mup"]["density"])) == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert {steps for _, steps in measured} == {5}


@pytest.mark.parametrize("words, said", [
    (("--widths", "64", "70"), "width 70 is not divisible by the size of a head"),
    (("--sparsities", "0.5", "1"), "sparsity.level=1.0"),
    (("--widths", "64", "64"), "--widths names one value, and a slope needs two"),
    (("--sparsities", "0.5"), "--sparsities names one value, and a slope needs two"),
], ids=str)
def test_what_has_no_slope_is_refused_before_any_model_is_trained(monkeypatch, capsys, words, said):
    monkeypatch.setattr(coordinate_check, "activation_sizes", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(fake_cuda, "install", lambda: None)
    assert coord_check.main([RECIPE, *words]) == 2
    assert said in capsys.readouterr().err
