"""DeepSpeed's configuration follows the recipe; a JSON file that contradicts it is refused with
both values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_spdf.engine.deepspeed_settings import deepspeed_settings
from megatron_spdf.recipe.rules import rule_violations

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs/deepspeed").glob("*.json"))
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
BUCKETS = {"reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000}


@pytest.fixture
def with_json(recipe, tmp_path):
    """A recipe with a JSON file of this content, and what is wrong with it."""
    def make(content: dict | str, **sections):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        parallel = {"zero_stage": 2, **sections.pop("parallel", {})}
        made = recipe(engine="deepspeed", deepspeed=str(path), parallel=parallel, **sections)
        return made, list(rule_violations(made))
    return make


def test_files_are_shipped():
    assert [path.stem for path in SHIPPED] == sorted(STAGES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_file_agrees_with_its_stage(recipe, path):
    parallel = {"zero_stage": STAGES[path.stem], "offload": "offload" in path.stem}
    made = recipe(engine="deepspeed", deepspeed=str(path), parallel=parallel)
    assert not list(rule_violations(made))
    assert "auto" not in json.dumps(deepspeed_settings(made))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_file_is_refused_at_another_stage(recipe, path):
    (wrong, *_) = rule_violations(recipe(engine="deepspeed", deepspeed=str(path),
                                         parallel={"zero_stage": 0}))
    assert (
        f"zero_optimization.stage={STAGES[path.stem]}" in wrong
        and "parallel.zero_stage makes it 0" in wrong
    )


def test_the_recipe_decides(recipe):
    settings = deepspeed_settings(recipe(
        engine="deepspeed", parallel={"data": 2, "zero_stage": 2, "offload": True},
        optimizer={"clip_grad": 0.5}))
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert settings["gradient_accumulation_steps"] == 2 and settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] and settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"},
                                             **BUCKETS}
    assert "optimizer" not in settings and "scheduler" not in settings


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_are_summed_in_fp32_and_nothing_else_is_set(recipe, precision, stage):
    bf16 = precision == "bf16"
    settings = deepspeed_settings(recipe(
        engine="deepspeed", train={"precision": precision}, parallel={"zero_stage": stage},
        optimizer={"clip_grad": 0.5}))
    assert settings == {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "communication_data_type": "fp32",  # between replicas
        "data_types": {"grad_accum_dtype": "fp32"} if bf16 and stage else {},
        "bf16": {"enabled": True, "check_grad_overflow": True} if bf16 else {"enabled": False},
        "fp16": {"enabled": False},
        "gradient_clipping": 0.5 if bf16 or stage else 0.0,  # the engine's own
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}, **BUCKETS},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def test_a_file_adds_what_the_recipe_says_nothing_about(with_json):
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 7,
            "offload_optimizer": {"device": "none", "buffer_count": 7}}
    made, broken = with_json({"zero_optimization": zero, "wall_clock_breakdown": True,
                              "communication_data_type": "bf16", "train_batch_size": "auto",
                              "elasticity": {"enabled": False}})
    assert not broken
    settings = deepspeed_settings(made)
    assert settings["zero_optimization"] == {**BUCKETS, **zero}
    assert settings["wall_clock_breakdown"] and settings["communication_data_type"] == "bf16"
    assert settings["train_batch_size"] == 8


CONTRADICTIONS = {
    "stage": ({"zero_optimization": {"stage": 3}},
              ["zero_optimization.stage=3", "parallel.zero_stage makes it 2"]),
    "batch": ({"train_batch_size": 16}, ["train_batch_size=16", "train.global_batch makes it 8"]),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 4},
                    ["train_micro_batch_size_per_gpu=4", "makes it 2"]),
    "accumulation": ({"gradient_accumulation_steps": 1},
                     ["gradient_accumulation_steps=1", "makes it 4"]),
    "clipping": ({"gradient_clipping": 5.0},
                 ["gradient_clipping=5.0", "optimizer.clip_grad makes it 1.0"]),
    "bf16": ({"bf16": {"enabled": False}}, ["bf16.enabled=false", "train.precision makes it true"]),
    "fp16": ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "train.precision makes it false"]),
    "offload": ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
                ['offload_optimizer.device="nvme"', 'parallel.offload makes it "none"']),
    "rate": ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
             ["optimizer.params.lr=1", "makes it 0.001"]),
    "betas": ({"optimizer": {"params": {"betas": [0.9, 0.95]}}},
              ["betas=[0.9, 0.95]", "makes it [0.9, 0.999]"]),
    "optimizer": ({"optimizer": {"type": "Lamb"}}, ['optimizer.type="Lamb"', 'makes it "AdamW"']),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}},
                  ['has a scheduler, {"type": "WarmupLR"}', "remove it"]),
    "auto": ({"zero_optimization": {"reduce_bucket_size": "auto"}},
             ['reduce_bucket_size="auto"', "give a value"]),
    "parameters offloaded": ({"zero_optimization": {"offload_param": {"device": "cpu"}}},
                             ['offload_param.device="cpu"', "parallel.zero_stage=2",
                              "zero_stage=3 only"]),
    "misspelt": ({"zero_optimisation": {"overlap_comm": True}},
                 ["has zero_optimisation,", "write zero_optimization"]),
    "not JSON": ("{", ["line 1: not JSON"]),
    "a list": ("[]", ["should be a mapping of keys"]),
    "a key twice": ('{"gradient_clipping": 1,\n"gradient_clipping": 2}',
                    ["line 2: the key 'gradient_clipping' is given twice"]),
}


@pytest.mark.parametrize("content, parts", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradiction_is_named_with_both_values(with_json, content, parts):
    _, broken = with_json(content)
    assert len(broken) == 1
    for part in ["ds.json", *parts]:
        assert part in broken[0]


def test_values_that_agree_are_no_contradiction(with_json):
    _, broken = with_json({
        "train_batch_size": 8, "gradient_clipping": 1, "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8,
                                                  "weight_decay": 0.1}}})
    assert not broken


def test_missing_file_is_named(recipe, tmp_path):
    (wrong,) = rule_violations(recipe(engine="deepspeed", deepspeed=str(tmp_path / "none.json")))
    assert "none.json cannot be read" in wrong and "configs/deepspeed" in wrong


@pytest.mark.parametrize("sections, parts", [
    ({"engine": "deepspeed", "parallel": {"pipeline": 2}},
     ["engine=deepspeed", "parallel.pipeline=2"]),
    ({"parallel": {"zero_stage": 2}},
     ["parallel.zero_stage=2 needs engine=deepspeed", "engine=megatron"]),
    ({"parallel": {"zero_stage": 3}},
     ["parallel.zero_stage=3 needs engine=deepspeed", "engine=megatron"]),
    ({"parallel": {"offload": True}}, ["parallel.offload=true needs engine=deepspeed"]),
    ({"deepspeed": "x.json"}, ["deepspeed=x.json needs engine=deepspeed"]),
    ({"engine": "deepspeed", "parallel": {"zero_stage": 0, "offload": True}},
     ["offload=true", "zero_stage=0"]),
])
def test_what_an_engine_cannot_do_is_named(recipe, sections, parts):
    (wrong,) = rule_violations(recipe(**sections))
    for part in parts:
        assert part in wrong


@pytest.mark.parametrize("content, said", [
    ({"steps_per_print": "5"}, 'has steps_per_print="5", a text; write the number without quotes'),
    ({"zero_optimization": {"reduce_bucket_size": "5e8"}},
     'has zero_optimization.reduce_bucket_size="5e8", a text'),
    ({"gradient_predivide_factor": "nan"}, "a text"),
    ({"communication_data_type": "fp16", "steps_per_print": 5, "wall_clock_breakdown": True}, "")])
def test_a_number_in_quotes_is_refused(with_json, content, said):
    _, wrong = with_json(content)
    assert len(wrong) == bool(said) and all(said in sentence for sentence in wrong)
