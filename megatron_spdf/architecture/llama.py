"""Llama 2 and 3, and what computes the same: SmolLM2, TinyLlama, Mistral without a window.

RMSNorm before each part, rotary positions, SwiGLU, grouped queries, no biases (Touvron et al. 2023,
arXiv 2307.09288, section 2.2; Grattafiori et al. 2024, arXiv 2407.21783, table 3). Shapes by name
are of the published models; the longest sequence is what they were trained for.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, model_validator
from typing_extensions import TypedDict

from megatron_spdf.architecture.base import ARCHITECTURES, EMBEDDING, HEAD, Model, Weight
from megatron_spdf.architecture.forms import Form
from megatron_spdf.architecture.rotary import read_rotary, rotary_keys, write_rotary
from megatron_spdf.section import MOST_WIDTH

LLAMA_2 = {"vocab_size": 32000, "max_positions": 4096}
LLAMA_3 = {"vocab_size": 128256, "rotary_base": 500_000.0, "query_groups": 8}
LLAMA_3_1 = LLAMA_3 | {"max_positions": 131072, "rotary_scaling": 8.0}
LLAMA_3_2 = LLAMA_3 | {"max_positions": 131072, "rotary_scaling": 32.0, "tied": True}
SMOLLM2 = {"vocab_size": 49152, "max_positions": 8192, "rotary_base": 100_000.0, "tied": True}
PRESETS: dict[str, dict[str, Any]] = {
    "llama_2_7b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn_hidden": 11008, **LLAMA_2},
    "llama_2_13b": {"layers": 40, "hidden": 5120, "heads": 40, "ffn_hidden": 13824, **LLAMA_2},
    "llama_2_70b": {"layers": 80, "hidden": 8192, "heads": 64, "query_groups": 8,
                    "ffn_hidden": 28672, **LLAMA_2},
    "llama_3_8b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn_hidden": 14336, **LLAMA_3,
                   "max_positions": 8192},
    "llama_3_1_8b": {"layers": 32, "hidden": 4096, "heads": 32, "ffn_hidden": 14336, **LLAMA_3_1},
    "llama_3_1_70b": {"layers": 80, "hidden": 8192, "heads": 64, "ffn_hidden": 28672,
                      **LLAMA_3_1},
    "llama_3_2_1b": {"layers": 16, "hidden": 2048, "heads": 32, "ffn_hidden": 8192, **LLAMA_3_2},
    "llama_3_2_3b": {"layers": 28, "hidden": 3072, "heads": 24, "ffn_hidden": 8192, **LLAMA_3_2},
    "smollm2_135m": {"layers": 30, "hidden": 576, "heads": 9, "query_groups": 3,
                     "ffn_hidden": 1536, **SMOLLM2},
    "smollm2_360m": {"layers": 32, "hidden": 960, "heads": 15, "query_groups": 5,
                     "ffn_hidden": 2560, **SMOLLM2},
    "smollm2_1_7b": {"layers": 24, "hidden": 2048, "heads": 32, "ffn_hidden": 8192, **SMOLLM2,
                     "rotary_base": 130_000.0},
    "tinyllama_1_1b": {"layers": 22, "hidden": 2048, "heads": 32, "query_groups": 4,
                       "ffn_hidden": 5632, "vocab_size": 32000, "max_positions": 2048},
}
MISTRAL_PRESETS: dict[str, dict[str, Any]] = {
    "mistral_7b_v0_3": {"layers": 32, "hidden": 4096, "heads": 32, "query_groups": 8,
                        "ffn_hidden": 14336, "vocab_size": 32768, "max_positions": 32768,
                        "rotary_base": 1e6},
}
# transformers' names of our fields and modules
SIZES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
         "query_groups": "num_key_value_heads", "ffn_hidden": "intermediate_size",
         "vocab_size": "vocab_size", "max_positions": "max_position_embeddings"}
OUTSIDE = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight",
           "decoder.final_layernorm.weight": "model.norm.weight"}
MODULES = {"input_layernorm": ("input_layernorm",),
           "self_attention.linear_qkv": tuple(f"self_attn.{x}_proj" for x in "qkv"),
           "self_attention.q_layernorm": ("self_attn.q_norm",),
           "self_attention.k_layernorm": ("self_attn.k_norm",),
           "self_attention.linear_proj": ("self_attn.o_proj",),
           "pre_mlp_layernorm": ("post_attention_layernorm",),
           "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
           "mlp.linear_fc2": ("mlp.down_proj",)}


class Configuration(TypedDict, total=False):
    """Keys of transformers' configurations that are read, and their types."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    head_dim: int | None
    hidden_act: str
    rms_norm_eps: FiniteFloat
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    rope_theta: FiniteFloat | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    layer_types: list[str] | None
    sliding_window: int | None
    use_sliding_window: bool
    max_window_layers: int


_CONFIGURATION = TypeAdapter(Configuration)


class Llama(Model):
    """A Llama: RMSNorm, rotary positions, SwiGLU, grouped queries, no biases.

    Attributes:
        COMPUTES: what it computes, as transformers' configuration says it.
        HEAD_WIDTH: of a configuration without `head_dim`; None: the width over the heads.
        GROUPED: a configuration must have `num_key_value_heads`.
    """

    name: ClassVar = "llama"
    title: ClassVar = "Llama"
    PRESETS: ClassVar = PRESETS
    norm: ClassVar = "RMSNorm"
    activation: ClassVar = "silu"
    gated: ClassVar = True
    biases: ClassVar = False
    positions: ClassVar = "rotary"
    huggingface: ClassVar = "llama"
    huggingface_prefix: ClassVar = "model."
    huggingface_ignored: ClassVar = (".rotary_emb.inv_freq",)  # used to be saved
    huggingface_class: ClassVar = "LlamaForCausalLM"
    COMPUTES: ClassVar[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False}
    HEAD_WIDTH: ClassVar[int | None] = None
    GROUPED: ClassVar = False

    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; fields given beside it win")
    head_width: int = Field(gt=0, le=MOST_WIDTH,
                            description="of a head; default: hidden / heads")
    slices: int = Field(
        gt=0, le=MOST_WIDTH,
        description="that every weight is cut into, each with as many active entries, and the "
                    "largest tensor-parallel degree; default: query_groups")
    norm_eps: float = Field(1e-5, gt=0.0, lt=1.0,
                            description="added to the mean square of a norm's input")
    rotary_base: float = Field(10_000.0, gt=1.0, description="theta of the rotary frequencies")
    rotary_scaling: float = Field(
        1.0, ge=1.0, description="factor by which Llama 3.1 slows frequencies that turn less than "
                                 "once in 8192 tokens; 1: none")
    tied: bool = Field(False, description="the LM head is the word embedding")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        values = super()._fill(values)
        if not isinstance(values, dict):
            return values
        hidden, heads, groups, inner = (values.get(key) for key in (
            "hidden", "heads", "query_groups", "ffn_hidden"))
        if all(type(n) is int and n > 0 for n in (hidden, heads)):
            values.setdefault("head_width", max(1, hidden // heads))
        if all(type(n) is int and n > 0 for n in (groups, inner)):
            values.setdefault("slices", math.gcd(groups, inner))
        elif None in (groups, inner):
            values.setdefault("slices", 1)  # the missing one alone is said
        return values

    def rule_violations(self):
        yield from super().rule_violations()
        if self.head_width % 2:
            yield (f"model.head_width={self.head_width} is odd, and rotary positions turn pairs; "
                   "take an even width")

    def huggingface_config(self) -> dict[str, Any]:
        return {**{theirs: getattr(self, ours) for ours, theirs in SIZES.items()},
                **self.COMPUTES, "hidden_act": "silu", "rms_norm_eps": self.norm_eps,
                "head_dim": self.head_width, "tie_word_embeddings": self.tied,
                "attention_dropout": self.dropout, "architectures": [self.huggingface_class],
                "rope_parameters": write_rotary(self.rotary_base, self.rotary_scaling)}

    def huggingface_legacy(self) -> dict[str, Any]:
        return rotary_keys(self.rotary_base, self.rotary_scaling)

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> Llama:
        _CONFIGURATION.validate_python(config, strict=True)
        sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
        if sizes["query_groups"] is None and not cls.GROUPED:
            sizes["query_groups"] = sizes["heads"]
        missing = [SIZES[ours] for ours, size in sizes.items() if size is None]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}; use the config.json the model was "
                             "saved with")
        cls._require(config)
        base, scaling = read_rotary(config)
        width = config.get("head_dim")
        model = cls(**sizes, head_width=cls.HEAD_WIDTH if width is None else width,
                    norm_eps=config.get("rms_norm_eps", 1e-6), rotary_base=base,
                    rotary_scaling=scaling, tied=config.get("tie_word_embeddings", False))
        if broken := list(model.rule_violations()):
            raise ValueError(f"has a shape that no {cls.title} here can have: "
                             f"{'; '.join(broken)}")
        return model

    @classmethod
    def _require(cls, config: dict[str, Any]) -> None:
        """Raises a ValueError if a configuration computes something else."""
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"has hidden_act={config['hidden_act']!r}, and a {cls.title} here "
                             "computes 'silu' only; its outputs would differ")
        for key, wanted in cls.COMPUTES.items():
            if (found := config.get(key, wanted)) != wanted:
                raise ValueError(f"has {key}={found!r}, and a {cls.title} here computes "
                                 f"{wanted!r} only; its outputs would differ")
        kinds = set(config.get("layer_types") or ["full_attention"])
        if window := cls._window(config):
            kinds.add(f"sliding_window={window}")
        if kinds != {"full_attention"}:
            raise ValueError(f"has {', '.join(sorted(kinds - {'full_attention'}))}, and here every "
                             "token attends to all before it; use a model without windows, or one "
                             "whose max_position_embeddings is within its window")

    @classmethod
    def _window(cls, config: dict[str, Any]) -> int | None:
        """Tokens that a layer of a configuration attends to at most, if they are fewer than its
        positions."""
        return None

    def huggingface_form(self, weight: Weight) -> Form:
        if weight.name in (EMBEDDING, HEAD):
            return self.vocabulary(OUTSIDE[weight.name])
        if weight.name in OUTSIDE:
            return Form((OUTSIDE[weight.name],), (weight.shape,))
        module, part = weight.name.split(".", 3)[3].rsplit(".", 1)
        names = tuple(f"model.layers.{weight.layer}.{m}.{part}" for m in MODULES[module])
        if module == "self_attention.linear_qkv":
            rows = [n * self.head_width for n in (self.heads, *[self.query_groups] * 2)]
            return Form(names, tuple((n, *weight.shape[1:]) for n in rows), self.split_qkv,
                        self.join_qkv)
        if module == "mlp.linear_fc1":
            shapes = ((self.ffn_hidden, self.hidden),) * 2
            return Form(names, shapes, self.split_gates, self.join_gates)
        return Form(names, (weight.shape,))


class Mistral(Llama):
    """A Mistral without a sliding window, which computes what a Llama does."""

    name: ClassVar = "mistral"
    title: ClassVar = "Mistral"
    PRESETS: ClassVar = MISTRAL_PRESETS
    huggingface: ClassVar = "mistral"
    huggingface_class: ClassVar = "MistralForCausalLM"
    COMPUTES: ClassVar = {}
    GROUPED: ClassVar = True

    preset: Literal[tuple(MISTRAL_PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; fields given beside it win")

    def huggingface_config(self) -> dict[str, Any]:
        return {**super().huggingface_config(), "sliding_window": None}

    @classmethod
    def _window(cls, config: dict[str, Any]) -> int | None:
        return narrowing_window(config)


def narrowing_window(config: dict[str, Any]) -> int | None:
    """The sliding window of a configuration, if it is under the positions that the model has."""
    window = config.get("sliding_window", 4096)  # what a missing key means in transformers
    return None if window is None or window >= config["max_position_embeddings"] else window


for family in (Llama, Mistral):
    ARCHITECTURES.register(family.name, family)
