"""What may change between the starts of a run, and what makes it another run."""

from __future__ import annotations

import pytest

from megatron_spdf.recipe.compare import changes_of_run
from megatron_spdf.recipe.finetune import Finetune
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


FREE = {"deepspeed", "engine", "output", "parallel", "evaluate", "checkpoint", "log",
        "fault_tolerance", "kernels", "model.preset", "sparsity.dense_copy", "sparsity.reached",
        "data.workers", "data.index_cache", "data.tokenizer", "data.end_of_document",
        "data.on_blend_change", "train.micro_batch", "train.recompute"}
OF_STAGES = {f"optimizer.{key}" for key in (
    "lr", "embedding_lr", "norm_lr", "min_lr_ratio", "decay", "decay_share", "warmup_tokens")}


@pytest.mark.parametrize(("sections", "more", "less"), [
    ({"parametrization": "mup", "distill": {"teacher": "there"}}, set(), set()),
    ({}, {"mup_base", "distill"}, set()),
    ({"parametrization": "density"}, {"distill", *(f"mup_base.{key}" for key in (
        "hidden", "head_width", "input_multiplier", "output_multiplier"))}, set()),
    ({"stages": [{"share": 0.5, "sparsity": 0.75}, {"share": 0.5, "sparsity": 0.0}]},
     {"mup_base", "distill", "sparsity", *OF_STAGES},
     {"sparsity.dense_copy", "sparsity.reached"})], ids=["all", "none", "density", "stages"])
def test_nothing_else_of_a_recipe_may_change(recipe, sections, more, less):
    """Each key that a recipe has is of one kind or the other."""
    assert free_of(recipe(**sections)) == (FREE | more) - less


def test_nothing_else_of_a_fine_tuning_recipe_may():
    made = Finetune.model_validate({
        "checkpoint": "there", "output": "tuned", "data": {"task": "e2e", "path": "data"},
        "train": {"global_batch": 8, "micro_batch": 4}, "optimizer": {"lr": 1e-3},
        "distill": {"teacher": "teacher"}})
    assert free_of(made) == {"output", "engine", "deepspeed", "parallel", "save", "log",
                             "fault_tolerance", "kernels", "sweep", "train.micro_batch",
                             "train.recompute"}


def free_of(made: Recipe | Finetune) -> set[str]:
    """Keys of a recipe that its identity leaves out, sections by their name."""
    whole, kept = made.model_dump(), made.identity()
    for sparsity in [stage["sparsity"] for stage in whole.get("stages", [])]:
        del sparsity["dense_copy"], sparsity["reached"]
    inner = {f"{name}.{key}" for name, section in kept.items() if isinstance(section, dict)
             for key in whole[name].keys() - section.keys()}
    assert all(whole[name][key] == value for name, section in kept.items()
               if isinstance(section, dict) for key, value in section.items())
    assert all(whole[name] == value for name, value in kept.items() if not isinstance(value, dict))
    return (whole.keys() - kept.keys()) | inner
