"""The coordinate check in small: under `mup` activations are of one size at every width and
density, under `standard` they grow with both."""

import pytest
from harness import outcome, run_cases

from megatron_spdf.evaluation.coordinate_check import scaling_exponents

pytestmark = pytest.mark.slow

HEAD = 16
CELLS = {"width": {width: (width, 0.0) for width in (32, 64, 128, 256)},
         "density": {1.0 - level: (128, level) for level in (0.0, 0.75, 0.9375)}}


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    def recipe(rule: str, width: int, level: float) -> dict:
        model = {"hidden": width, "heads": width // HEAD, "layers": 2}
        return make_recipe(parametrization=rule, model=model, sparsity=level,
                           mup_base={"hidden": 128}, optimizer={"warmup_tokens": 0, "lr": 3e-3})

    cases = {f"{rule} {what} {scale}": ("coordinates", {"recipe": recipe(rule, *cell), "steps": 4})
             for rule in ("standard", "mup") for what, scales in CELLS.items() for scale,
             cell in scales.items()}
    return run_cases(1, cases, tmp_path_factory.mktemp("coordinates"))


def slopes(results, rule: str, what: str) -> dict[str, float]:
    return scaling_exponents({scale: outcome(results, f"{rule} {what} {scale}")
                              for scale in CELLS[what]})


@pytest.mark.parametrize("what", CELLS)
def test_activations_are_of_one_size(results, what):
    found = slopes(results, "mup", what)
    assert len(found) == 6  # embedding, logits, attention and MLP of two layers
    # Not zero: four steps of small models on a few sequences, and finite widths. Without the rules
    # it is about one.
    assert all(abs(slope) < 0.3 for slope in found.values()), found


@pytest.mark.parametrize("what", CELLS)
def test_without_the_rules_they_grow(results, what):
    found = slopes(results, "standard", what)
    assert all(found[f"layer {n} mlp"] > 0.6 for n in (0, 1)), found
