"""The coordinate check in small: under `mup` activations are of one size at every width and
density, under `standard` they grow with both."""

import pytest
from cases import coordinates

from megatron_spdf.evaluation.coordinate_check import scaling_exponents

pytestmark = pytest.mark.slow

HEAD = 16
CELLS = {"width": {width: (width, 0.0) for width in (32, 64, 128, 256)},
         "density": {1.0 - level: (128, level) for level in (0.0, 0.75, 0.9375)}}


@pytest.fixture(scope="module")
def slopes(ranks, make_recipe):
    """Exponents of the sizes of activations in width or density, under a parametrization."""
    def sizes(rule: str, width: int, level: float) -> dict[str, float]:
        model = {"hidden": width, "heads": width // HEAD, "layers": 2}
        recipe = make_recipe(parametrization=rule, model=model, sparsity=level,
                             mup_base={"hidden": 128}, optimizer={"warmup_tokens": 0, "lr": 3e-3})
        return ranks(1).run(coordinates, recipe, steps=4)

    return lambda rule, what: scaling_exponents({scale: sizes(rule, *cell)
                                                 for scale, cell in CELLS[what].items()})


@pytest.mark.parametrize("what", CELLS)
def test_activations_are_of_one_size(slopes, what):
    found = slopes("mup", what)
    assert len(found) == 6  # embedding, logits, attention and MLP of two layers
    # Not zero: four steps of small models on a few sequences, and finite widths. Without the rules
    # it is about one.
    assert all(abs(slope) < 0.3 for slope in found.values()), found


@pytest.mark.parametrize("what", CELLS)
def test_without_the_rules_they_grow(slopes, what):
    found = slopes("standard", what)
    assert all(found[f"layer {n} mlp"] > 0.6 for n in (0, 1)), found
