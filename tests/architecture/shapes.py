"""Models whose widths, heads, groups and ranks are all different numbers."""

from __future__ import annotations

from typing import ClassVar

from megatron_spdf.architecture.base import Model
from megatron_spdf.architecture.gpt import Gpt


class Gated(Model):
    """RMSNorm, rotary positions, SwiGLU, no biases, an LM head of its own."""

    name: ClassVar = "gated"
    title: ClassVar = "gated"
    norm: ClassVar = "RMSNorm"
    norm_eps: ClassVar = 1e-6
    activation: ClassVar = "silu"
    gated: ClassVar = True
    biases: ClassVar = False
    positions: ClassVar = "rotary"
    rotary_base: ClassVar = 5e5
    tied: ClassVar = False


class Normed(Gated):
    """Heads whose queries and keys are normed too."""

    name: ClassVar = "normed"
    qk_norm: ClassVar = True


SHAPE = {"layers": 5, "hidden": 24, "heads": 6, "ffn_hidden": 40, "vocab_size": 300,
         "max_positions": 64}


def model(family: type[Model], **changes) -> Model:
    return family(**{**SHAPE, **changes})


GPT, GROUPED, GATED = model(Gpt), model(Gpt, query_groups=3), model(Gated, query_groups=3)
