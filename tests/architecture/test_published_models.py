"""Presets have the parameter counts that are published with the models, and the facts of their
families."""

import pytest

from megatron_spdf.architecture.base import ARCHITECTURES, HEAD
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.schedule.flops import forward_flops

# What the models' pages say, to the parameter: rows of the vocabulary without our padding.
PUBLISHED = {
    ("llama", "llama_2_7b"): 6_738_415_616, ("llama", "llama_2_13b"): 13_015_864_320,
    ("llama", "llama_2_70b"): 68_976_648_192, ("llama", "llama_3_8b"): 8_030_261_248,
    ("llama", "llama_3_1_8b"): 8_030_261_248, ("llama", "llama_3_1_70b"): 70_553_706_496,
    ("llama", "llama_3_2_1b"): 1_235_814_400, ("llama", "llama_3_2_3b"): 3_212_749_824,
    ("llama", "smollm2_135m"): 134_515_008, ("llama", "smollm2_360m"): 361_821_120,
    ("llama", "smollm2_1_7b"): 1_711_376_384, ("llama", "tinyllama_1_1b"): 1_100_048_384,
    ("mistral", "mistral_7b_v0_3"): 7_248_023_552, ("qwen2", "qwen2_5_0_5b"): 494_032_768,
    ("qwen2", "qwen2_5_1_5b"): 1_543_714_304, ("qwen2", "qwen2_5_3b"): 3_085_938_688,
    ("qwen2", "qwen2_5_7b"): 7_615_616_512, ("qwen3", "qwen3_0_6b"): 596_049_920,
    ("qwen3", "qwen3_1_7b"): 1_720_574_976, ("qwen3", "qwen3_4b"): 4_022_468_096,
    ("qwen3", "qwen3_8b"): 8_190_735_360, ("qwen3", "qwen3_14b"): 14_768_307_200,
}


# Attention heads, and groups of them that share keys, of which some counts above do not depend.
HEADS = {
    "gpt": {"gpt2_small": (12, 12), "gpt2_medium": (16, 16), "gpt2_large": (20, 20),
            "gpt2_xl": (25, 25), "gpt3_125m": (12, 12), "gpt3_350m": (16, 16),
            # gpt3_xl: 24 of 128 are published, which its width of 2048 does not hold
            "gpt3_760m": (16, 16), "gpt3_xl": (16, 16), "gpt3_2b7": (32, 32), "gpt3_6b7": (32, 32),
            "gpt3_13b": (40, 40), "gpt3_175b": (96, 96)},
    "llama": {"llama_2_7b": (32, 32), "llama_2_13b": (40, 40), "llama_2_70b": (64, 8),
              "llama_3_8b": (32, 8), "llama_3_1_8b": (32, 8), "llama_3_1_70b": (64, 8),
              "llama_3_2_1b": (32, 8), "llama_3_2_3b": (24, 8), "smollm2_135m": (9, 3),
              "smollm2_360m": (15, 5), "smollm2_1_7b": (32, 32), "tinyllama_1_1b": (32, 4)},
    "mistral": {"mistral_7b_v0_3": (32, 8)},
    "qwen2": {"qwen2_5_0_5b": (14, 2), "qwen2_5_1_5b": (12, 2), "qwen2_5_3b": (16, 2),
              "qwen2_5_7b": (28, 4)},
    "qwen3": {"qwen3_0_6b": (16, 8), "qwen3_1_7b": (16, 8), "qwen3_4b": (32, 8),
              "qwen3_8b": (32, 8), "qwen3_14b": (40, 8)},
}


def make(family: str, preset: str):
    return ARCHITECTURES.get(family)(preset=preset)


def test_every_preset_is_held_to_its_published_count():
    assert set(PUBLISHED) == {(family, preset) for family in ("llama", "mistral", "qwen2", "qwen3")
                              for preset in ARCHITECTURES.get(family).PRESETS}


@pytest.mark.parametrize(("family", "preset"), PUBLISHED)
def test_published_parameters(family, preset):
    model = make(family, preset)
    padding = (model.padded_vocab - model.vocab_size) * model.hidden * (1 if model.tied else 2)
    assert sum(w.numel for w in model.weights()) - padding == PUBLISHED[family, preset]
    assert not list(model.rule_violations())


@pytest.mark.parametrize("family", HEADS)
def test_published_heads(family):
    presets = ARCHITECTURES.get(family).PRESETS
    assert {preset: (made.heads, made.query_groups) for preset in presets
            for made in [make(family, preset)]} == HEADS[family]


def test_weights_by_hand():
    """Llama-3.2-1B and Qwen3-0.6B: shapes and FLOPs as their configurations give them."""
    llama = {w.name.removeprefix("decoder.layers.0."): w.shape
             for w in make("llama", "llama_3_2_1b").weights()}
    assert llama["self_attention.linear_qkv.weight"] == (32 * 64 + 2 * 8 * 64, 2048)
    assert llama["mlp.linear_fc1.weight"] == (2 * 8192, 2048)
    assert HEAD not in llama and not any("bias" in name or "position" in name for name in llama)
    model = make("qwen3", "qwen3_0_6b")
    qwen = {w.name.removeprefix("decoder.layers.0."): w.shape for w in model.weights()}
    assert qwen["self_attention.linear_qkv.weight"] == (16 * 128 + 2 * 8 * 128, 1024)
    assert qwen["self_attention.linear_proj.weight"] == (1024, 2048)
    assert qwen["self_attention.q_layernorm.weight"] == (128,)
    flops = forward_flops(model, 2048)
    assert flops.attention == 4 * 28 * 2048 * 16 * 128
    assert flops.logits == 2 * 151936 * 1024
    assert flops.linear == 2 * 28 * (4096 * 1024 + 1024 * 2048 + 3 * 1024 * 3072)


@pytest.mark.parametrize(("model", "length"), [
    ({"architecture": "llama", "preset": "llama_3_2_1b"}, 4096),  # of 131,072
    ({"architecture": "llama", "preset": "tinyllama_1_1b"}, 2048),
    ({"architecture": "qwen3", "preset": "qwen3_0_6b", "max_positions": 512}, 512),
    ({"preset": "gpt3_xl", "max_positions": 8192}, 8192)])  # as many as there are positions
def test_sequences_are_not_as_long_as_a_model_can_rotate(model, length):
    recipe = Recipe.model_validate({"output": "x", "model": model, "optimizer": {"lr": 1e-3},
                                    "train": {"tokens": 1e9, "global_batch": 8, "micro_batch": 1}})
    assert recipe.train.sequence_length == length


def test_biases_are_where_a_family_has_them():
    biases = {family: {w.name.split(".")[-2] for w in make(family, preset).weights()
                       if w.name.endswith(".bias")}
              for family, preset in (("llama", "llama_3_8b"), ("qwen2", "qwen2_5_0_5b"),
                                     ("qwen3", "qwen3_0_6b"))}
    assert biases == {"llama": set(), "qwen2": {"linear_qkv"}, "qwen3": set()}


@pytest.mark.parametrize(("preset", "slices", "degrees"), [
    ("qwen2_5_1_5b", 4, [1, 2, 4]), ("qwen2_5_0_5b", 2, [1, 2]), ("qwen2_5_3b", 16, [1, 2, 4, 8])])
def test_more_slices_than_groups_allow_more_tensor_parallelism(preset, slices, degrees):
    """Several ranks then have the queries of one group."""
    model = ARCHITECTURES.get("qwen2")(preset=preset, slices=slices)
    assert not list(model.rule_violations())
    assert model.tensor_degrees()[:len(degrees)] == degrees


def test_slices_that_no_model_has():
    (said,) = ARCHITECTURES.get("qwen2")(preset="qwen2_5_0_5b", slices=7).rule_violations()
    assert "model.slices=7 does not divide" in said and "slices may be [1, 2]" in said
