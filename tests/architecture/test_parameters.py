"""Parameters of a model, in Megatron-Core's names and in the forms of other programs, against plain
loops and published counts."""

from __future__ import annotations

import math

import pytest
import torch
from shapes import GATED, GPT, GROUPED, SHAPE, Gated

from megatron_spdf.architecture.base import divisors
from megatron_spdf.architecture.forms import UnknownFamily, model_of, pad_vocabulary
from megatron_spdf.architecture.gpt import Gpt

# as Hugging Face counts them: the embedding once, without padding
PUBLISHED = {"gpt2_small": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080,
             "gpt2_xl": 1_557_611_200}
# billions, of Brown et al. 2020, table 2.1; 13B has 40 heads of 128 here and 5140 there
GPT3 = {"gpt3_125m": 0.125, "gpt3_350m": 0.35, "gpt3_760m": 0.76, "gpt3_xl": 1.3, "gpt3_2b7": 2.7,
        "gpt3_6b7": 6.7, "gpt3_13b": 13.0, "gpt3_175b": 175.0}


def count(made: Gpt) -> int:
    padding = (made.padded_vocab - made.vocab_size) * made.hidden
    return sum(weight.numel for weight in made.weights()) - padding


@pytest.mark.parametrize("preset", PUBLISHED)
def test_gpt2_has_as_many_parameters_as_are_published(preset):
    assert count(Gpt(preset=preset, max_positions=1024)) == PUBLISHED[preset]


@pytest.mark.parametrize("preset", GPT3)
def test_gpt3_has_about_as_many(preset):
    assert count(Gpt(preset=preset)) / 1e9 == pytest.approx(GPT3[preset], rel=0.05)


def test_every_parameter_of_a_gated_decoder():
    """Name, shape, the axis that tensor parallelism cuts, and the spread of its initial values."""
    std, out = 0.02, 0.02 / math.sqrt(10)
    found = [(w.name, w.shape, w.axis, w.layer, w.std, w.linear) for w in GATED.weights()]
    layer = [("input_layernorm.weight", (24,), None, None, False),
             ("self_attention.linear_qkv.weight", (48, 24), 0, std, True),
             ("self_attention.linear_proj.weight", (24, 24), 1, out, True),
             ("pre_mlp_layernorm.weight", (24,), None, None, False),
             ("mlp.linear_fc1.weight", (80, 24), 0, std, True),
             ("mlp.linear_fc2.weight", (24, 40), 1, out, True)]
    assert found == [
        ("embedding.word_embeddings.weight", (384, 24), 0, -1, std, False),
        *((f"decoder.layers.{number}.{name}", shape, axis, number, spread, linear)
          for number in range(5) for name, shape, axis, spread, linear in layer),
        ("decoder.final_layernorm.weight", (24,), None, 5, None, False),
        ("output_layer.weight", (384, 24), 0, 5, std, False)]


def test_what_a_gpt_has_beside():
    names = {w.name: (w.shape, w.axis, w.std, w.linear) for w in GROUPED.weights()}
    assert names.keys() - {w.name for w in GATED.weights()} == {
        "embedding.position_embeddings.weight", "decoder.final_layernorm.bias", *(
            f"decoder.layers.{number}.{part}.bias" for number in range(5) for part in (
                "input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj",
                "pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"))}
    assert {w.name for w in GATED.weights()} - names.keys() == {"output_layer.weight"}
    assert names["embedding.position_embeddings.weight"] == ((64, 24), None, 0.02, False)
    # a bias lies with the rows of its weight, or whole on every rank
    assert names["decoder.layers.1.self_attention.linear_qkv.bias"] == ((48,), 0, None, False)
    assert names["decoder.layers.1.mlp.linear_fc2.bias"] == ((24,), None, None, False)
    assert names["decoder.layers.1.mlp.linear_fc1.weight"] == ((40, 24), 0, 0.02, True)


def test_megatron_core_is_told_all_facts():
    made = GATED.model_copy(update={"dropout": 0.1, "init_std": 0.03})
    assert made.transformer_config() == {
        "num_layers": 5, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 3,
        "kv_channels": 4, "ffn_hidden_size": 40, "gated_linear_unit": True,
        "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": False,
        "normalization": "RMSNorm", "layernorm_epsilon": 1e-6,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "init_method_std": 0.03}
    assert made.gpt_model() == {
        "vocab_size": 384, "max_sequence_length": 64, "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False, "rotary_base": 5e5, "rope_scaling": False,
        "rope_scaling_factor": 1.0}
    assert GPT.gpt_model() == {
        "vocab_size": 384, "max_sequence_length": 64,
        "position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True}


def test_megatron_lms_arguments_are_those_that_differ_from_its_defaults():
    shape = ["--num-layers 5", "--hidden-size 24", "--ffn-hidden-size 40",
             "--num-attention-heads 6", "--max-position-embeddings 64"]
    groups = ["--group-query-attention", "--num-query-groups 3"]
    assert GPT.megatron_arguments() == [*shape, "--position-embedding-type learned_absolute"]
    assert GROUPED.megatron_arguments() == [*shape, "--position-embedding-type learned_absolute",
                                            *groups]
    assert GATED.megatron_arguments() == [
        *shape, "--position-embedding-type rope", "--rotary-base 500000", *groups,
        "--normalization RMSNorm", "--norm-epsilon 1e-06", "--swiglu", "--disable-bias-linear",
        "--untie-embeddings-and-output-weights"]


def fused(made, matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    """W_QKV, row by row: of each group its queries, its key, its value."""
    rows, width, per_group = [], made.head_width, made.heads // made.query_groups
    for group in range(made.query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += list(matrices["W_Q"][head * width : (head + 1) * width])
        for name in ("W_K", "W_V"):
            rows += list(matrices[name][group * width : (group + 1) * width])
    return torch.stack(rows)


def interleaved(made, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """W_I of a gated layer, row by row: of each slice its gates and its ups."""
    rows, size = [], len(gate) // made.slices
    for number in range(made.slices):
        for part in (gate, up):
            rows += list(part[number * size : (number + 1) * size])
    return torch.stack(rows)


@pytest.mark.parametrize("made", [GPT, GROUPED, GATED.model_copy(update={"ffn_hidden": 42})],
                         ids=["gpt", "grouped", "gated"])
def test_the_matrices_of_a_layer_are_found_in_its_weights(made):
    draw = torch.Generator().manual_seed(0)
    keys = made.query_groups * made.head_width
    shapes = {"W_Q": (24, 24), "W_K": (keys, 24), "W_V": (keys, 24), "W_D": (24, 24),
              **({"W_I gate": (made.ffn_hidden, 24), "W_I up": (made.ffn_hidden, 24)} if made.gated
                 else {"W_I": (made.ffn_hidden, 24)}), "W_O": (24, made.ffn_hidden)}
    expected = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    up = (interleaved(made, expected["W_I gate"], expected["W_I up"]) if made.gated
          else expected["W_I"])
    at = "decoder.layers.3."
    weights = {f"{at}self_attention.linear_qkv.weight": fused(made, expected),
               f"{at}self_attention.linear_proj.weight": expected["W_D"],
               f"{at}mlp.linear_fc1.weight": up, f"{at}mlp.linear_fc2.weight": expected["W_O"]}
    found = dict(made.matrices(weights.__getitem__, 3))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    parts = made.split_qkv(weights[f"{at}self_attention.linear_qkv.weight"])
    assert torch.equal(made.join_qkv(parts), weights[f"{at}self_attention.linear_qkv.weight"])
    # Megatron-LM has all gates, then all ups
    theirs = made.to_megatron(f"{at}mlp.linear_fc1.weight", up)
    assert torch.equal(theirs, torch.cat([expected["W_I gate"], expected["W_I up"]])
                       if made.gated else up)
    assert torch.equal(made.from_megatron(f"{at}mlp.linear_fc1.weight", theirs), up)
    other = expected["W_O"]
    assert made.to_megatron(f"{at}mlp.linear_fc2.weight", other) is other
    assert made.from_megatron(f"{at}mlp.linear_fc2.weight", other) is other


@pytest.mark.parametrize("made", [GPT, GROUPED, GATED.model_copy(update={"ffn_hidden": 42})],
                         ids=["gpt", "grouped", "gated"])
def test_each_row_is_of_its_matrix(made):
    """W_Q, W_K, W_V, W_D, W_I or its gate and its up, W_O, counted from 0."""
    keys, more, inner = made.query_groups * 4, made.gated, made.ffn_hidden
    sizes = [24, keys, keys, 24, inner, *([inner] if more else []), 24]
    rows = [torch.full((size, 1), number) for number, size in enumerate(sizes)]
    expected = {
        "self_attention.linear_qkv": fused(made, dict(zip(("W_Q", "W_K", "W_V"), rows,
                                                          strict=False))),
        "self_attention.linear_proj": rows[3],
        "mlp.linear_fc1": interleaved(made, rows[4], rows[5]) if more else rows[4],
        "mlp.linear_fc2": rows[-1]}
    weights = {w.name: w for w in made.weights()}
    for name, numbers in expected.items():
        found = made.matrix_of_rows(weights[f"decoder.layers.3.{name}.weight"])
        assert found.tolist() == numbers.flatten().tolist(), name


@pytest.mark.parametrize(("made", "norm"), [(GPT, 2.0 / 3.0), (GATED, 2.0)])
def test_multipliers_go_into_the_weights_that_they_multiply(made, norm):
    """Embeddings' output 3, the head's input 2, queries 5; a tied head has the embeddings' 3."""
    def factor(name: str) -> float | list[float]:
        return made.folded(name, 3.0, 2.0, 5.0)

    assert factor("embedding.word_embeddings.weight") == 3.0
    assert factor("decoder.final_layernorm.weight") == norm
    assert factor("decoder.layers.0.mlp.linear_fc1.weight") == 1.0
    queries = made.heads // made.query_groups
    assert factor("decoder.layers.0.self_attention.linear_qkv.weight") == (
        [5.0] * 4 * queries + [1.0] * 8) * made.query_groups


def test_rows_past_the_vocabulary_are_its_mean():
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    assert torch.equal(pad_vocabulary(rows, 5), torch.cat([rows, torch.tensor([[3.0, 3.0]] * 2)]))
    assert pad_vocabulary(rows, 3) is rows
    form = GPT.vocabulary("wte")
    assert form.shapes == ((300, 24),)
    (cut,) = form.split(torch.ones(384, 24))
    assert cut.shape == (300, 24) and form.join([cut]).shape == (384, 24)


def test_what_decides_whether_weights_fit():
    other = Gpt(**{**SHAPE, "hidden": 48, "dropout": 0.3, "init_std": 0.5})
    assert GPT.differences(other) == {"hidden": (24, 48)}
    assert GPT.differences(Gpt(**SHAPE, preset="gpt2_small", dropout=0.1)) == {}


def test_the_family_is_the_one_that_computes_what_a_configuration_says():
    class Other(Gated):
        huggingface = "gpt2"

        @classmethod
        def from_huggingface(cls, config):
            raise ValueError("has learned positions")

    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 6, "vocab_size": 300,
              "n_positions": 64}
    assert model_of(config, [Other, Gpt]) == Gpt(layers=2, hidden=24, heads=6, vocab_size=300,
                                                 max_positions=64)
    with pytest.raises(UnknownFamily, match="type 'opt'; those that can be read are gpt2$"):
        model_of({"model_type": "opt"}, [Gpt, Gated])
    with pytest.raises(UnknownFamily, match="which the architectures 'gpt' and 'gpt' both read"):
        model_of(config, [Gpt, Gpt])
    with pytest.raises(ValueError, match="^has learned positions$"):
        model_of(config, [Other])
    with pytest.raises(UnknownFamily, match="of type None"):
        model_of({}, [Gated])


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 2]), (9, [1, 3, 9]), (7, [1, 7]),
                                             (12, [1, 2, 3, 4, 6, 12])])
def test_divisors_ascend(n, expected):
    assert divisors(n) == expected


@pytest.mark.parametrize(("most", "broken"), [(22_560, 0), (22_559, 1)])
def test_a_model_has_at_most_so_many_weights(monkeypatch, most, broken):
    """24 x (300 + 5 x (2 x 24 + 2 x 40)) of them."""
    monkeypatch.setattr("megatron_spdf.architecture.base.MOST_WEIGHTS", most)
    assert len([said for said in GPT.rule_violations() if "make over 2.3e+04" in said]) == broken
