"""What a decoder costs: FLOPs, activations, and what moves through memory."""

from __future__ import annotations

from megatron_spdf.architecture.sizes import Sizes


class Costs:
    """Costs that follow from the shape and the facts of a `Model`, whose base class this is."""

    def forward_flops(self, keys: float) -> tuple[float, float, float]:
        """FLOPs per token of a forward pass with all weights: linear weights, QK^T and PV over so
        many keys, LM head."""
        linear = 2.0 * sum(w.numel for w in self.weights() if w.linear)
        attention = 4.0 * self.layers * keys * self.heads * self.head_width
        return linear, attention, 2.0 * self.vocab_size * self.hidden

    @property
    def norm_statistics(self) -> int:
        """Bytes a token that a norm keeps for backward beside its input, fp32: mean and deviation,
        or the deviation."""
        return 8 if self.norm == "LayerNorm" else 4

    def layer_activations(self, size: Sizes) -> dict[str, int]:
        """Bytes that one layer keeps of a micro-batch for backward, by tensor, on a GPU with fused
        attention and activation functions.

        With T tokens, B sequences, width h, n heads in g groups of width d, feed-forward width f, t
        tensor-parallel ranks, w bytes a value, and 1/t more for what sequence parallelism shards
        (marked *):

            inputs of both norms             2 w T B h *
            their means and deviations      16 T B *              fp32; RMSNorm 8 T B
            inputs of W_QKV and W_I          2 w T B h *
            Q, K, V                          w T B (n + 2 g) d / t
            Q again, in groups               w T B n d / t        copied out, of several groups of
                                                                  several heads; else a view
            Q, K again, rotated              w T B (n + g) d / t  the copy is kept beside these
                                                                  only to be normed
            deviations of norms by head      4 T B (n + g) / t    fp32
            cosines, sines of Q and K        4 w T d
            attention output                 w T B n d / t
            log-sum-exp of the softmax       4 T B n / t          fp32
            before and after activation      2 w T B f / t        gated: 3 w T B f / t
            two dropout masks                2 T B h *            with dropout only

        With more ranks than groups, every rank has all of Q, K, V, and one key a token.
        """
        groups = max(self.query_groups, size.tensor)
        several = self.query_groups > size.tensor and self.heads > self.query_groups
        rotary = self.positions == "rotary"
        copied = self.heads * (several and (self.qk_norm or not rotary))
        copied += (self.heads + groups) * rotary
        fused = self.qkv_rows * (size.tensor if size.tensor > self.query_groups else 1)
        return {
            "norm inputs": 2 * size.hidden,
            "norm statistics": int(2 * self.norm_statistics * size.tokens * size.share)
            + (self.norm_statistics * size.tokens * (self.heads + groups) // size.tensor
               if self.qk_norm else 0),
            "linear inputs": 2 * size.hidden,
            "queries, keys, values": size.sharded(fused + copied * self.head_width),
            "cosines and sines": (4 * size.width * size.length * self.head_width
                                  if self.positions == "rotary" else 0),
            "attention output": size.sharded(self.heads * self.head_width),
            "log-sum-exp": 4 * size.tokens * self.heads // size.tensor,
            "activation function": (3 if self.gated else 2) * size.sharded(self.ffn_hidden),
            "dropout masks": int(2 * size.tokens * self.hidden * size.share) if self.dropout else 0,
        }

    def feed_forward_backward(self, size: Sizes, whole_gradients: bool) -> int:
        """Bytes of the largest temporaries of a layer's backward pass, less what it has freed.

        They are at W_O: the gradients of its output, its input and itself. A gated layer may have
        larger ones at activation(gate) x up or at W_I.

        Args:
            whole_gradients: a weight's gradient is made whole, also where it is cut afterwards.
        """
        of_weight = self.hidden if whole_gradients else 0
        down = size.width * self.ffn_hidden * (size.tokens + of_weight) // size.tensor
        if not self.gated:
            return size.hidden + down
        inner = size.sharded(self.ffn_hidden)
        up = size.hidden + 2 * size.width * self.ffn_hidden * of_weight // size.tensor - inner
        return size.hidden + max(down, 2 * inner, up)

    def forward_passes(self, size: Sizes) -> int:
        """Bytes of activations that a layer's forward pass reads or writes outside of products,
        with fused functions.

        They are two norms (4 tensors) and two sums with bias and dropout (6), of width h; before
        and after the activation function (2, gated 3), of width f; and what is rotated (2), and
        normed by head (2).
        """
        by_head = self.heads + self.query_groups
        rotated = by_head * ((self.positions == "rotary") + self.qk_norm)
        return (10 * size.hidden + (3 if self.gated else 2) * size.sharded(self.ffn_hidden)
                + 2 * size.sharded(rotated * self.head_width))
