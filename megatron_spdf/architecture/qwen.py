"""Qwen2, Qwen2.5 and the dense Qwen3: Llamas with biases on Q, K and V, or with norms of each
head's queries and keys (Yang et al. 2024, arXiv 2407.10671, section 2.2.1; 2025, arXiv 2505.09388,
section 2). Embeddings have more rows than the tokenizer has ids.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_spdf.architecture.base import ARCHITECTURES
from megatron_spdf.architecture.llama import Llama, narrowing_window

QWEN2_5 = {"vocab_size": 151936, "max_positions": 32768}
QWEN3 = {"vocab_size": 151936, "max_positions": 40960, "query_groups": 8}
QWEN2_PRESETS: dict[str, dict[str, Any]] = {
    "qwen2_5_0_5b": {"layers": 24, "hidden": 896, "heads": 14, "query_groups": 2,
                     "ffn_hidden": 4864, **QWEN2_5, "tied": True},
    "qwen2_5_1_5b": {"layers": 28, "hidden": 1536, "heads": 12, "query_groups": 2,
                     "ffn_hidden": 8960, **QWEN2_5, "max_positions": 131072, "tied": True},
    "qwen2_5_3b": {"layers": 36, "hidden": 2048, "heads": 16, "query_groups": 2,
                   "ffn_hidden": 11008, **QWEN2_5, "tied": True},
    "qwen2_5_7b": {"layers": 28, "hidden": 3584, "heads": 28, "query_groups": 4,
                   "ffn_hidden": 18944, "vocab_size": 152064, "max_positions": 131072},
}
QWEN3_PRESETS: dict[str, dict[str, Any]] = {
    "qwen3_0_6b": {"layers": 28, "hidden": 1024, "heads": 16, "ffn_hidden": 3072, **QWEN3,
                   "tied": True},
    "qwen3_1_7b": {"layers": 28, "hidden": 2048, "heads": 16, "ffn_hidden": 6144, **QWEN3,
                   "tied": True},
    "qwen3_4b": {"layers": 36, "hidden": 2560, "heads": 32, "ffn_hidden": 9728, **QWEN3,
                 "tied": True},
    "qwen3_8b": {"layers": 36, "hidden": 4096, "heads": 32, "ffn_hidden": 12288, **QWEN3},
    "qwen3_14b": {"layers": 40, "hidden": 5120, "heads": 40, "ffn_hidden": 17408, **QWEN3},
}
for _shape in QWEN3_PRESETS.values():
    _shape["head_width"] = 128


class Qwen2(Llama):
    """A Qwen2 or Qwen2.5: a Llama with biases on queries, keys and values."""

    name: ClassVar = "qwen2"
    title: ClassVar = "Qwen2"
    PRESETS: ClassVar = QWEN2_PRESETS
    qkv_bias: ClassVar = True
    huggingface: ClassVar = "qwen2"
    huggingface_class: ClassVar = "Qwen2ForCausalLM"
    COMPUTES: ClassVar = {}
    GROUPED: ClassVar = True

    preset: Literal[tuple(QWEN2_PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; fields given beside it win")
    norm_eps: float = Field(1e-6, gt=0.0, lt=1.0,
                            description="added to the mean square of a norm's input")
    rotary_base: float = Field(1e6, gt=1.0, description="theta of the rotary frequencies")

    def huggingface_config(self) -> dict[str, Any]:
        return {**super().huggingface_config(), "use_sliding_window": False}

    @classmethod
    def _window(cls, config: dict[str, Any]) -> int | None:
        """Only layers past `max_window_layers` have one."""
        used = config.get("use_sliding_window") and not config.get("layer_types")
        if not used or config.get("max_window_layers", 28) >= config["num_hidden_layers"]:
            return None
        return narrowing_window(config)


class Qwen3(Qwen2):
    """A dense Qwen3: a Llama with RMSNorm on each head's queries and keys."""

    name: ClassVar = "qwen3"
    title: ClassVar = "Qwen3"
    PRESETS: ClassVar = QWEN3_PRESETS
    qkv_bias: ClassVar = False
    qk_norm: ClassVar = True
    huggingface: ClassVar = "qwen3"
    huggingface_class: ClassVar = "Qwen3ForCausalLM"
    COMPUTES: ClassVar = {"attention_bias": False}
    HEAD_WIDTH: ClassVar = 128

    preset: Literal[tuple(QWEN3_PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; fields given beside it win")


for family in (Qwen2, Qwen3):
    ARCHITECTURES.register(family.name, family)
