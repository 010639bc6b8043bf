"""The section of a recipe that says what the model is."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_spdf.architecture.presets import PRESETS
from megatron_spdf.section import Count, Section


class Model(Section):
    """A GPT: learned positions, tied embeddings, biases, GELU (tanh), pre-LayerNorm."""

    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; layers, hidden and heads given beside it win")
    layers: int = Field(gt=0, description="transformer layers")
    hidden: int = Field(gt=0, description="width d_model")
    heads: int = Field(gt=0, description="attention heads")
    query_groups: int = Field(
        gt=0, description="key/value groups, also the largest tensor-parallel degree; default: "
                          "heads")
    ffn_hidden: int = Field(gt=0,
                            description="width of the feed-forward layer; default: 4 x hidden")
    vocab_size: Count = Field(50257, gt=0, description="tokens the tokenizer knows")
    max_positions: Count = Field(2048, gt=0, description="longest sequence, in tokens")
    dropout: float = Field(0.0, ge=0.0, lt=1.0,
                           description="of embeddings, attention and residuals")
    init_std: float = Field(0.02, gt=0.0,
                            description="std of the initial weights; residual outputs: / sqrt(2 "
                                        "layers)")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        known = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        values = {**known, **{k: v for k, v in values.items() if v is not None or k == "preset"}}
        values.setdefault("query_groups", values.get("heads"))
        if isinstance(values.get("hidden"), int):
            values.setdefault("ffn_hidden", 4 * values["hidden"])
        return values
