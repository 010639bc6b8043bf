"""GPT-2 and GPT-3: learned positions, LayerNorm before each part, GELU (tanh), biases, a tied head.

Shapes by name are of GPT-2 (Radford et al. 2019, table 2; small is the 124M model) and GPT-3 (Brown
et al. 2020, table 2.1, with the head counts that divide the width). `gpt2_small` and `gpt3_xl` are
the two models of SPDF (table 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from megatron_spdf.architecture.base import ARCHITECTURES, EMBEDDING, POSITIONS, Model, Weight
from megatron_spdf.architecture.forms import Form, concatenate

if TYPE_CHECKING:
    from torch import Tensor

PRESETS: dict[str, dict[str, int]] = {
    "gpt2_small": {"layers": 12, "hidden": 768, "heads": 12},
    "gpt2_medium": {"layers": 24, "hidden": 1024, "heads": 16},
    "gpt2_large": {"layers": 36, "hidden": 1280, "heads": 20},
    "gpt2_xl": {"layers": 48, "hidden": 1600, "heads": 25},
    "gpt3_125m": {"layers": 12, "hidden": 768, "heads": 12},
    "gpt3_350m": {"layers": 24, "hidden": 1024, "heads": 16},
    "gpt3_760m": {"layers": 24, "hidden": 1536, "heads": 16},
    "gpt3_xl": {"layers": 24, "hidden": 2048, "heads": 16},
    "gpt3_2b7": {"layers": 32, "hidden": 2560, "heads": 32},
    "gpt3_6b7": {"layers": 32, "hidden": 4096, "heads": 32},
    "gpt3_13b": {"layers": 40, "hidden": 5120, "heads": 40},
    "gpt3_175b": {"layers": 96, "hidden": 12288, "heads": 96},
}
# transformers' names of our parameters and modules
NAMES = {EMBEDDING: "wte.weight", POSITIONS: "wpe.weight",
         "decoder.final_layernorm": "ln_f", "decoder.layers": "h",
         "input_layernorm": "ln_1", "self_attention.linear_qkv": "attn.c_attn",
         "self_attention.linear_proj": "attn.c_proj", "pre_mlp_layernorm": "ln_2",
         "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"}
SIZES = {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "vocab_size": "vocab_size",
         "max_positions": "n_positions"}
# transformers' names of GELU's tanh approximation, equal up to rounding
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
# What a GPT computes, as GPT2Config says it, and what that says where a key is missing.
COMPUTES = {
    "activation_function": (GELU_TANH, "gelu_new"),
    "layer_norm_epsilon": ((1e-5,), 1e-5),
    "scale_attn_weights": ((True,), True),
    "scale_attn_by_inverse_layer_idx": ((False,), False),
    "reorder_and_upcast_attn": ((False,), False),
    "add_cross_attention": ((False,), False),
}


class Configuration(TypedDict, total=False):
    """Keys of transformers' configurations that are numbers or flags, and their types."""

    n_layer: int
    n_embd: int
    n_head: int
    n_inner: int | None
    vocab_size: int
    n_positions: int
    tie_word_embeddings: bool


_CONFIGURATION = TypeAdapter(Configuration)


class Gpt(Model):
    """A GPT: learned positions, tied embeddings, biases, GELU (tanh), pre-LayerNorm."""

    name: ClassVar = "gpt"
    PRESETS: ClassVar = PRESETS
    norm: ClassVar = "LayerNorm"
    norm_eps: ClassVar = 1e-5
    activation: ClassVar = "gelu"
    gated: ClassVar = False
    biases: ClassVar = True
    positions: ClassVar = "learned"
    tied: ClassVar = True
    title: ClassVar = "GPT-2"
    huggingface: ClassVar = "gpt2"
    huggingface_prefix: ClassVar = "transformer."
    # GPT-2's causal masks used to be saved with it.
    huggingface_ignored: ClassVar = (".attn.bias", ".attn.masked_bias")

    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; layers, hidden and heads given beside it win")

    def huggingface_config(self) -> dict[str, Any]:
        if self.query_groups != self.heads:
            raise ValueError(
                f"model.query_groups={self.query_groups} and model.heads={self.heads}: in GPT-2's "
                "architecture every head has a key and a value of its own, so only a model with as "
                "many query groups as heads can be exported")
        return {**{theirs: getattr(self, ours) for ours, theirs in SIZES.items()},
                "n_inner": self.ffn_hidden, "activation_function": "gelu_new",
                "layer_norm_epsilon": self.norm_eps, "tie_word_embeddings": True,
                "resid_pdrop": self.dropout, "embd_pdrop": self.dropout,
                "attn_pdrop": self.dropout, "architectures": ["GPT2LMHeadModel"]}

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> Gpt:
        _CONFIGURATION.validate_python(config, strict=True)
        for key, (allowed, default) in COMPUTES.items():
            if config.get(key, default) not in allowed:
                raise ValueError(f"has {key}={config[key]!r}, and our GPT computes "
                                 f"{' or '.join(map(repr, allowed))} only; its outputs would "
                                 "differ")
        missing = [key for key in SIZES.values() if key not in config]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}; use the config.json the model was "
                             "saved with")
        inner = config.get("n_inner")
        return cls(**{ours: config[theirs] for ours, theirs in SIZES.items()},
                   ffn_hidden=4 * config["n_embd"] if inner is None else inner)

    def huggingface_form(self, weight: Weight) -> Form:
        """Linear layers are transposed there, and their queries, keys and values in one piece."""
        name = weight.name
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        name = self.huggingface_prefix + name
        if weight.name == EMBEDDING:
            return self.vocabulary(name)
        fused = ".linear_qkv." in weight.name

        def split(tensor: Tensor) -> Sequence[Tensor]:
            tensor = concatenate(self.split_qkv(tensor)) if fused else tensor
            return [tensor.T if weight.linear else tensor]

        def join(tensors: Sequence[Tensor]) -> Tensor:
            (tensor,) = tensors
            tensor = tensor.T if weight.linear else tensor
            return self.join_qkv(tensor.chunk(3)) if fused else tensor

        shape = weight.shape[::-1] if weight.linear else weight.shape
        return Form((name,), (shape,), split, join)


ARCHITECTURES.register(Gpt.name, Gpt)
