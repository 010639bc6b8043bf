"""What may change between the starts of a run, and what makes it another run."""

from __future__ import annotations

import pytest

from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.recipe import Recipe

SAME = [
    {"output": "elsewhere"}, {"engine": "deepspeed"}, {"deepspeed": "x.json"},
    {"train": {"micro_batch": 4}}, {"train": {"recompute": "full"}},
    {"parallel": {"tensor": 2, "sequence": True, "data": 2}}, {"parallel": {"zero_stage": 0}},
    {"data": {"workers": 0}}, {"data": {"index_cache": "/tmp"}}, {"data": {"tokenizer": "copy"}},
    {"data": {"on_blend_change": "continue"}}, {"sparsity": {"dense_copy": "per_layer"}},
    {"log": {"every": 1}}, {"checkpoint": {"every": 7}}, {"evaluate": {"every": 7}},
    {"fault_tolerance": {"max_skipped": 0}}, {"kernels": {"norm": "torch"}},
    {"mup_base": {"hidden": 128}},  # which says nothing of the standard parametrization
]
OTHER = {
    "seed": {"seed": 9}, "model.layers": {"model": {"layers": 2}},
    "model.dropout": {"model": {"dropout": 0.1}}, "model.init_std": {"model": {"init_std": 0.1}},
    "parametrization": {"parametrization": "mup"}, "sparsity.seed": {"sparsity": {"seed": 9}},
    "sparsity.level": {"sparsity": {"level": 0.5}}, "data.train": {"data": {"train": ["other"]}},
    "data.reset_positions": {"data": {"reset_positions": True}},
    "train.tokens": {"train": {"tokens": 5120}},
    "train.global_batch": {"train": {"global_batch": 16}},
    "train.sequence_length": {"train": {"sequence_length": 16}},
    "train.precision": {"train": {"precision": "fp32"}},
    "train.label_smoothing": {"train": {"label_smoothing": 0.1}},
    "optimizer.lr": {"optimizer": {"lr": 2e-3}}, "optimizer.beta2": {"optimizer": {"beta2": 0.95}},
    "optimizer.clip_grad": {"optimizer": {"clip_grad": 0.0}},
    "optimizer.warmup_tokens": {"optimizer": {"warmup_tokens": 256}},
    "optimizer.embedding_lr": {"optimizer": {"embedding_lr": 2e-2}},
    "optimizer.norm_lr": {"optimizer": {"norm_lr": 2e-2}},
    "optimizer.decay_share": {"optimizer": {"decay_share": 0.2}},
    "model.embedding_std": {"model": {"embedding_std": 0.1}},
}


@pytest.fixture
def changes(recipe):
    """What a run refuses of a start with these sections, whichever of the two began it."""
    def changes(begun: dict, start: dict) -> list[str]:
        common = {"sparsity": {"level": 0.75}, "data": {"train": ["corpus"]}}

        def made(sections: dict) -> Recipe:
            return recipe(**{**common, **{name: {**common.get(name, {}), **section}
                                          if isinstance(section, dict) else section
                                          for name, section in sections.items()}})
        found = changes_of_run(made(begun), made(start))
        assert bool(found) == bool(changes_of_run(made(start), made(begun)))
        return found
    return changes


@pytest.mark.parametrize("section", SAME, ids=str)
def test_how_a_run_is_computed_may_change(changes, section):
    assert changes({}, section) == []


@pytest.mark.parametrize("key", OTHER)
def test_what_a_run_computes_may_not(changes, key):
    found = changes({}, OTHER[key])
    assert any(said.startswith(f"{key} is ") and " there and " in said for said in found), found


def test_the_base_model_matters_under_mup(changes):
    rules = {"parametrization": "mup"}
    (found,) = changes({**rules, "mup_base": {"hidden": 128}},
                       {**rules, "mup_base": {"hidden": 64}})
    assert found == "mup_base.hidden is 128 there and 64 here"


def test_of_the_base_model_the_density_alone_matters_under_density(changes):
    rules = {"parametrization": "density"}
    assert not changes(rules, {**rules, "mup_base": {"hidden": 64}})
    (found,) = changes(rules, {**rules, "mup_base": {"density": 0.5}})
    assert found == "mup_base.density is 1.0 there and 0.5 here"


def test_another_blend_is_another_run(changes):
    other = {"train": [], "blend": [{"path": "corpus", "weight": 1.0}]}
    refused = {said.split(" is ")[0] for said in changes({}, {"data": other})}
    assert refused == {"data.train", "data.blend"}
