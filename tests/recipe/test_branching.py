"""What a run may have otherwise from a step on, the steps so far being the same."""

from __future__ import annotations

import pytest

from megatron_spdf.recipe.compare import changes_so_far
from megatron_spdf.recipe.recipe import Recipe

TRUNK = {"optimizer": {"decay": "constant", "warmup_tokens": 512}}  # ten steps of 256 tokens
LONG = {"train": {"tokens": 40 * 256}}


@pytest.fixture
def changes(recipe):
    """What the first steps of a run with these sections do not share with one of others."""
    def changes(before: dict, now: dict, step: int) -> list[str]:
        def made(sections: dict):
            common = {"data": {"train": ["corpus"]}, "sparsity": {"level": 0.75}, **TRUNK}
            return recipe(**{name: {**common.get(name, {}), **section}
                             if isinstance(section, dict) else section
                             for name, section in {**common, **sections}.items()})
        return changes_so_far(made(before), made(now), step)
    return changes


def fall(share: float, shape: str = "linear") -> dict:
    return {"optimizer": {"decay": shape, "decay_share": share}}


@pytest.mark.parametrize(("before", "now", "step"), [
    ({}, LONG, 10), (LONG, {}, 5), ({}, fall(0.5), 5), ({}, fall(0.5, "exponential"), 1),
    ({}, {**LONG, **fall(0.2)}, 10), (fall(0.4), {**LONG, **fall(0.5)}, 6),
    (fall(0.4), fall(0.4, "cosine"), 6), (fall(0.4), {**LONG, **fall(1.0)}, 2),
    ({}, {"optimizer": {"decay": "linear", "min_lr_ratio": 0.0}}, 2), (fall(0.4), fall(0.4), 9),
    (LONG, {"log": {"every": 1}, "parallel": {"tensor": 2}, "engine": "deepspeed"}, 3)], ids=str)
def test_length_and_fall_are_free_at_the_peak(changes, before, now, step):
    assert changes(before, now, step) == []


@pytest.mark.parametrize(("before", "now", "step", "said"), [
    ({}, fall(0.5), 6, "the learning rate falls from step 5 on here"),
    (fall(0.4), LONG, 7, "the learning rate falls from step 6 on there"),
    (fall(0.4), fall(0.4, "cosine"), 7, "the learning rate falls from step 6 on there"),
    ({}, {"optimizer": {"decay": "cosine"}}, 3, "the learning rate falls from step 2 on here"),
    ({}, {"seed": 9, **LONG}, 1, "seed is 1234 there and 9 here"),
    ({}, {"optimizer": {"lr": 2e-3}}, 1, "optimizer.lr is 0.001 there and 0.002 here"),
    ({}, {"optimizer": {"embedding_lr": 2e-3}}, 1, "optimizer.embedding_lr is None there"),
    ({}, {"optimizer": {"warmup_tokens": 256}}, 9, "optimizer.warmup_tokens is 512 there"),
    ({}, {"model": {"embedding_std": 0.1}}, 1, "model.embedding_std is None there"),
], ids=str)
def test_all_else_is_not(changes, before, now, step, said):
    assert changes(before, now, step)[0].startswith(said)


def masks(algorithm: str, **update) -> dict:
    return {"sparsity": {"level": 0.75, "algorithm": algorithm, "update": update}}


@pytest.mark.parametrize(("sections", "same"), [
    (masks("static"), 10),
    # the fraction of a move depends on the length: up to the first at step 3
    (masks("set", every=3), 2),
    # with one fraction until the short run would have stopped: moves at 3 and 6, and one at 9
    (masks("rigl", every=3, anneal="constant"), 8),
    (masks("gmp", every=1), 2),  # dense for a quarter of ten steps
    (masks("acdc", turn=0.1), 1)], ids=["static", "set", "rigl", "gmp", "acdc"])
def test_masks_have_moved_alike(changes, sections, same):
    for step in range(1, 11):
        found = changes(sections, {**sections, **LONG}, step)
        assert (not found) == (step <= same), step
        assert not found or found[0].startswith(f"up to step {step} masks move otherwise in 10 ")
        assert changes(sections, {**sections, **fall(0.1)}, step) == [] or step > 9


def test_stages_depend_on_the_length():
    def made(tokens: int) -> Recipe:
        return Recipe.model_validate({
            "output": "run", "optimizer": {"lr": 1e-3, "decay": "constant"},
            "stages": [{"share": 0.5, "sparsity": 0.75}, {"share": 0.5, "sparsity": 0}],
            "model": {"layers": 4, "hidden": 64, "heads": 4, "vocab_size": 256},
            "train": {"tokens": tokens, "global_batch": 8, "micro_batch": 2,
                      "sequence_length": 32}})

    assert changes_so_far(made(2560), made(5120), 1) == ["train.tokens is 2560 there and 5120 here"]
