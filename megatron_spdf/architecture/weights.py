"""Every parameter of the GPT by its canonical name: shape, tensor-parallel axis, place, initial
spread.

The canonical name is Megatron-Core's own, with the layer counted over the whole model, so it is the
same on every pipeline stage. Pure Python: the plan, the initialization, the memory and FLOP counts
all read this list, and a test holds it against the parameters of the model that Megatron-Core
builds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_spdf.architecture.model import Model

EMBEDDING = "embedding.word_embeddings.weight"
TIED_OUTPUT = "output_layer.weight"
# fp32, at once: 2,668 tokens of GPT-2's vocabulary, enough to fill a GPU
LOGITS_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Weight:
    """One parameter tensor of the whole, unsharded model.

    Attributes:
        shape: of the unsharded tensor, (out, in) for matrices.
        axis: the tensor-parallel axis, None where every rank holds all of it.
        layer: number of the transformer layer from 0; -1 before the first, `layers` after the last.
        std: of the normal initial values; None: ones for norm weights, zeros for biases.
        linear: one of W_QKV, W_D, W_I, W_O of a layer, which SPDF makes sparse (Thangarasa et al.
            2023, A.1).
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None
    layer: int
    std: float | None = None
    linear: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def padded_vocab(model: Model) -> int:
    """Rows of the embedding: the vocabulary up to a multiple of 128 (tensor cores) and of the chunk
    count, so that shards are even and the same checkpoint serves every tensor-parallel degree."""
    multiple = math.lcm(128, model.query_groups)
    return -(-model.vocab_size // multiple) * multiple


def tokens_at_once(rows: int, tokens: int) -> int:
    """Tokens of a micro-batch that go through the LM head together: all of them, or as many as have
    `LOGITS_BYTES` of logits, in chunks of one size but for the last.

    Args:
        rows: of the embedding, on this tensor-parallel rank.
        tokens: of the micro-batch, T B.
    """
    chunks = -(-tokens // max(1, LOGITS_BYTES // (4 * rows)))
    return -(-tokens // chunks)


def model_weights(model: Model) -> list[Weight]:
    """All parameters in model order; the tied LM head is the word embedding and not listed
    again."""
    h, std = model.hidden, model.init_std
    first = [
        Weight(EMBEDDING, (padded_vocab(model), h), 0, -1, std),
        Weight("embedding.position_embeddings.weight", (model.max_positions, h), None, -1, std),
    ]
    layers = [w for layer in range(model.layers) for w in _layer(model, layer)]
    last = [Weight(f"decoder.final_layernorm.{p}", (h,), None, model.layers)
            for p in ("weight", "bias")]
    return first + layers + last


def _layer(m: Model, layer: int) -> list[Weight]:
    h, head = m.hidden, m.hidden // m.heads
    qkv = (m.heads + 2 * m.query_groups) * head  # rows grouped by query group: q.., k, v
    at = f"decoder.layers.{layer}."
    std, residual_std = m.init_std, m.init_std / math.sqrt(2 * m.layers)

    def linear(name: str, out: int, inputs: int, axis: int, spread: float) -> list[Weight]:
        return [Weight(f"{at}{name}.weight", (out, inputs), axis, layer, spread, linear=True),
                Weight(f"{at}{name}.bias", (out,), 0 if axis == 0 else None, layer)]

    def norm(name: str) -> list[Weight]:
        return [Weight(f"{at}{name}.{p}", (h,), None, layer) for p in ("weight", "bias")]

    return [
        *norm("input_layernorm"),
        *linear("self_attention.linear_qkv", qkv, h, 0, std),
        *linear("self_attention.linear_proj", h, h, 1, residual_std),
        *norm("pre_mlp_layernorm"),
        *linear("mlp.linear_fc1", m.ffn_hidden, h, 0, std),
        *linear("mlp.linear_fc2", h, m.ffn_hidden, 1, residual_std),
    ]
