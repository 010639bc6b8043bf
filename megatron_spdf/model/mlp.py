"""The gated feed-forward layer, W_O (activation(gate) x up), on slices."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class GatedMlp(MLP):
    """Megatron-Core's MLP whose W_I has, slice by slice, gates and ups as its rows.

    Megatron-Core halves a rank's rows instead, so that its shards are not pieces of one matrix.
    Here they are, in training and in checkpoints.

    Attributes:
        slices: of this rank.
    """

    slices: int

    @classmethod
    def convert(cls, mlp: MLP, slices: int) -> None:
        """Makes an MLP that Megatron-Core has built one of these."""
        mlp.__class__, mlp.slices = cls, slices

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, Tensor | None]:
        """(T, B, H) -> (T, B, H) and the bias that is still to be added."""
        x, bias = self.linear_fc1(hidden_states)  # (T, B, 2 F), F this rank's feed-forward width
        x = x if bias is None else x + bias
        by_slice = x.unflatten(-1, (self.slices, -1))  # (T, B, slices, 2 F / slices)
        if self.config.bias_activation_fusion:  # keeps its input alone for backward
            gated = bias_swiglu_impl(by_slice.flatten(0, 2), None)
        else:
            gate, up = by_slice.chunk(2, dim=-1)
            gated = self.activation_func(gate) * up
        return self.linear_fc2(gated.reshape(*x.shape[:-1], -1))

    # In which W_I is cut along its rows like any weight.
    sharded_state_dict = MegatronModule.sharded_state_dict
