"""An architecture of our own in one file: RMSNorm, rotary positions, SwiGLU, no biases, an LM head
of its own. transformers computes the same as a Granite without multipliers."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from megatron_spdf.architecture.base import ARCHITECTURES, EMBEDDING, HEAD, Model, Weight
from megatron_spdf.architecture.forms import Form

SIZES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
         "query_groups": "num_key_value_heads", "ffn_hidden": "intermediate_size",
         "vocab_size": "vocab_size", "max_positions": "max_position_embeddings",
         "norm_eps": "rms_norm_eps"}
# What a toy computes, as GraniteConfig says it.
COMPUTES = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
            "logits_scaling": 1.0}
# Modules of a layer, and what transformers has in their place.
MODULES = {"input_layernorm": ["input_layernorm"],
           "self_attention.linear_qkv": [f"self_attn.{x}_proj" for x in "qkv"],
           "self_attention.linear_proj": ["self_attn.o_proj"],
           "pre_mlp_layernorm": ["post_attention_layernorm"],
           "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
           "mlp.linear_fc2": ["mlp.down_proj"]}


class Toy(Model):
    """A toy decoder: RMSNorm, rotary positions, SwiGLU, no biases, an LM head of its own."""

    name: ClassVar = "toy"
    title: ClassVar = "toy Granite"
    norm: ClassVar = "RMSNorm"
    activation: ClassVar = "silu"
    gated: ClassVar = True
    biases: ClassVar = False
    positions: ClassVar = "rotary"
    tied: ClassVar = False
    huggingface: ClassVar = "granite"
    huggingface_prefix: ClassVar = "model."

    norm_eps: float = Field(1e-6, gt=0.0, description="added to the mean square of a norm's input")
    rotary_base: float = Field(10_000.0, gt=1.0, description="base of the rotary frequencies")

    def huggingface_config(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": self.rotary_base}
        return {**{theirs: getattr(self, ours) for ours, theirs in SIZES.items()}, **COMPUTES,
                "attention_multiplier": self.head_width**-0.5, "rope_parameters": rope,
                "attention_dropout": self.dropout, "architectures": ["GraniteForCausalLM"]}

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> Toy:
        for key, wanted in COMPUTES.items():
            if config.get(key, wanted) != wanted:
                raise ValueError(f"has {key}={config[key]!r}, and a toy computes {wanted!r} only")
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"has rope_type={rope['rope_type']!r}, and a toy rotates plainly")
        return cls(**{ours: config[theirs] for ours, theirs in SIZES.items()},
                   rotary_base=rope.get("rope_theta", 10_000.0))

    def huggingface_form(self, weight: Weight) -> Form:
        if weight.name in (EMBEDDING, HEAD):
            return self.vocabulary("model.embed_tokens.weight" if weight.name == EMBEDDING
                                   else "lm_head.weight")
        if weight.name == "decoder.final_layernorm.weight":
            return Form(("model.norm.weight",), (weight.shape,))
        module = weight.name.removesuffix(".weight").split(".", 3)[3]
        names = tuple(f"model.layers.{weight.layer}.{m}.weight" for m in MODULES[module])
        if module == "self_attention.linear_qkv":
            keys = (self.query_groups * self.head_width, self.hidden)
            shapes = ((self.heads * self.head_width, self.hidden), keys, keys)
            return Form(names, shapes, self.split_qkv, self.join_qkv)
        if module == "mlp.linear_fc1":
            shapes = ((self.ffn_hidden, self.hidden),) * 2
            return Form(names, shapes, self.split_gates, self.join_gates)
        return Form(names, (weight.shape,))


ARCHITECTURES.register(Toy.name, Toy)
