"""GPT-2 and GPT-3: learned positions, LayerNorm before each part, GELU (tanh), biases, a tied head.

Shapes by name are of GPT-2 (Radford et al. 2019, table 2; small is the 124M model) and GPT-3 (Brown
et al. 2020, table 2.1, with the head counts that divide the width). `gpt2_small` and `gpt3_xl` are
the two models of SPDF (table 1).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from megatron_spdf.architecture.base import ARCHITECTURES, Model

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

    preset: Literal[tuple(PRESETS)] | None = Field(  # type: ignore[valid-type]
        None, description="shape by name; layers, hidden and heads given beside it win")


ARCHITECTURES.register(Gpt.name, Gpt)
