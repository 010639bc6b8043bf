"""FLOPs of training: the one count in the project, used by the plan, the log and the reports.

The convention is the one that reproduces SPDF's supplement, Table 2, within 1%: a multiply-add is two FLOPs, the
backward pass costs twice the forward pass, only active weights count, attention is not halved for causality,
norms, biases and embeddings look-ups are free:

    per sequence = 72 L d^2 T (1 - s) + 12 L T^2 d + 6 V d T
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_spdf.config.recipe import Model
from megatron_spdf.model.weights import model_weights
from megatron_spdf.sparsity.plan import Plan

FORWARD_AND_BACKWARD = 3  # in units of the forward pass


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, forward and backward, by part."""

    linear: float
    attention: float
    logits: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.logits


def training_flops(model: Model, sequence_length: int, plan: Plan | None = None) -> Flops:
    """FLOPs per trained token.

    Args:
        sequence_length: T, tokens.
        plan: counts active weights only; None counts all, which is also what a GPU executes when the weights are
            expanded, as unstructured ones are.
    """
    weights = sum(w.numel for w in model_weights(model) if w.linear)
    if plan is not None:
        weights += plan.active - plan.numel
    return Flops(
        linear=2.0 * FORWARD_AND_BACKWARD * weights,
        attention=4.0 * FORWARD_AND_BACKWARD * model.layers * sequence_length * model.hidden,  # QK^T and PV
        logits=2.0 * FORWARD_AND_BACKWARD * model.vocab_size * model.hidden,
    )
