"""A family of decoders: its section of a recipe, and what follows from that.

A file beside this one (`gpt.py`) holds one family, a subclass of `Model`, and registers it. So does
a file of somebody else's, see `registry.py`. A subclass states facts (which norm, which positions,
...), from which the parameters, Megatron-Core's configuration and all costs follow; where they do
not, it overrides the method.

Canonical names are Megatron-Core's own, with layers counted over the whole model, so that they are
the same on every pipeline stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_spdf.architecture.costs import Costs
from megatron_spdf.architecture.forms import Forms
from megatron_spdf.registry import Registry
from megatron_spdf.section import (
    MOST_IDS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WEIGHTS,
    MOST_WIDTH,
    ByName,
    Count,
    Section,
)

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
POSITIONS = "embedding.position_embeddings.weight"
USUAL_LENGTH = 4096  # tokens, of sequences where a model takes up to 131,072
# Linear weights; embeddings and an LM head of its own; norms and biases.
Group = Literal["linear", "embedding", "norm"]
# Norms of each head's queries and keys: every tensor-parallel rank has their weights whole, and
# sees its own heads.
HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")


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
        matrices: rows of each matrix, where several are one weight; they may be interleaved.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None
    layer: int
    std: float | None = None
    linear: bool = False
    matrices: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def group(self) -> Group:
        """What it shares a learning rate with."""
        if self.linear:
            return "linear"
        return "norm" if self.std is None else "embedding"


class Follows:
    """A fact that follows from other fields, in families that have no field of its name.

    Args:
        of: model -> the fact.
    """

    def __init__(self, of: Callable[[Any], Any]):
        self.of = of

    def __get__(self, model: Any, family: type | None = None) -> Any:
        if model is None:  # so that a family's field shadows nothing
            raise AttributeError("a model has it, and its family does not")
        return self.of(model)


class Model(Costs, Forms, Section):
    """A decoder, of the family that `architecture` names."""

    # in which Megatron-Core's modules name their parameters
    ORDER: ClassVar = ("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm",
                       "k_layernorm", "pre_mlp_layernorm", "linear_fc1", "linear_fc2",
                       "final_layernorm", "output_layer")
    # Facts of a family. One that a recipe may change is a field of the same name.
    name: ClassVar[str]  # in a recipe's `model.architecture`
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}  # of a field `preset`, if there is one
    norm: ClassVar[Literal["LayerNorm", "RMSNorm"]]
    norm_eps: ClassVar[float]
    activation: ClassVar[str]  # name in torch.nn.functional; gelu is its tanh approximation
    gated: ClassVar[bool]  # W_O's input is activation(gate) x up, both rows of W_I
    biases: ClassVar[bool]  # of linear layers
    qkv_bias: ClassVar[bool] = False  # of W_QKV, where other linear layers have none
    qk_norm: ClassVar[bool] = False  # each head's queries and keys are normed, before rotation
    positions: ClassVar[Literal["learned", "rotary"]]
    rotary_base: ClassVar[float]  # frequencies are its powers -2 i / head_width
    rotary_scaling: ClassVar[float] = Follows(lambda model: 1.0)  # factor of Llama 3.1's
    tied: ClassVar[bool]  # the LM head is the word embedding
    head_width: ClassVar[int] = Follows(lambda model: model.hidden // model.heads)
    # Slices that weights are cut into, and so the largest tensor-parallel degree.
    slices: ClassVar[int] = Follows(lambda model: model.query_groups)

    architecture: str = Field("gpt", description="family of the model")
    layers: int = Field(gt=0, le=MOST_LAYERS, description="transformer layers")
    hidden: int = Field(gt=0, le=MOST_WIDTH, description="width d_model")
    heads: int = Field(gt=0, le=MOST_WIDTH, description="attention heads")
    query_groups: int = Field(
        gt=0, le=MOST_WIDTH,
        description="key/value groups, also the largest tensor-parallel degree; default: "
                          "heads")
    ffn_hidden: int = Field(gt=0, le=16 * MOST_WIDTH,
                            description="width of the feed-forward layer; default: 4 x hidden, of "
                                        "a gated one none")
    vocab_size: Count = Field(50257, gt=0, le=MOST_IDS, description="tokens the tokenizer knows")
    max_positions: Count = Field(2048, gt=0, le=MOST_POSITIONS,
                                 description="longest sequence, in tokens")
    dropout: float = Field(0.0, ge=0.0, lt=1.0,
                           description="of embeddings, attention and residuals")
    init_std: float = Field(0.02, gt=0.0,
                            description="std of the initial weights; residual outputs: / sqrt(2 "
                                        "layers)")
    embedding_std: float | None = Field(
        None, gt=0.0, description="std of the initial embeddings, and of an LM head that is not "
                                  "one of them; default: init_std")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        known = cls.PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        values = {"architecture": cls.name, **known,
                  **{k: v for k, v in values.items() if v is not None or k == "preset"}}
        values.setdefault("query_groups", values.get("heads"))
        if isinstance(values.get("hidden"), int) and not cls.gated:
            values.setdefault("ffn_hidden", 4 * values["hidden"])
        return values

    def rule_violations(self) -> Iterator[str]:
        """Every broken rule between the fields, as one sentence."""
        weights = self.hidden * (self.vocab_size
                                 + self.layers * (2 * self.hidden + 2 * self.ffn_hidden))
        if weights > MOST_WEIGHTS:
            yield (f"model.layers={self.layers}, hidden={self.hidden}, "
                   f"ffn_hidden={self.ffn_hidden} and vocab_size={self.vocab_size} make over "
                   f"{weights:.2g} weights; take fewer than {MOST_WEIGHTS:.0e}")
        if self.hidden % self.heads and "head_width" not in type(self).model_fields:
            yield (f"model.hidden={self.hidden} is not divisible by model.heads={self.heads}; "
                   f"heads may be {divisors(self.hidden)}")
        if self.heads % self.query_groups:
            yield (f"model.heads={self.heads} is not divisible by "
                   f"model.query_groups={self.query_groups}; query_groups may be "
                   f"{divisors(self.heads)}")
        if "slices" not in type(self).model_fields:
            if self.ffn_hidden % self.slices:
                yield (f"model.ffn_hidden={self.ffn_hidden} is not divisible by "
                       f"model.query_groups={self.slices}, the number of slices a weight is cut "
                       f"into; take a multiple of {self.slices}")
        elif not self.heads % self.query_groups and self.slices not in self.possible_slices():
            yield (f"model.slices={self.slices} does not divide all of model.heads={self.heads}, "
                   f"model.ffn_hidden={self.ffn_hidden} and the {self.qkv_rows} rows of W_QKV, or "
                   f"neither it nor model.query_groups={self.query_groups} divides the other; "
                   f"slices may be {self.possible_slices()}")

    def possible_slices(self) -> list[int]:
        """Numbers of slices that all weights can be cut into, each slice with whole heads."""
        common = math.gcd(self.heads, self.ffn_hidden)
        return [n for n in divisors(common) if self.qkv_rows % n == 0 and self._shares_groups(n)]

    def tensor_degrees(self) -> list[int]:
        """Possible tensor-parallel degrees. Ranks have whole query groups, or whole ranks one."""
        return [n for n in divisors(self.slices) if self._shares_groups(n)]

    def _shares_groups(self, n: int) -> bool:
        return self.query_groups % n == 0 or n % self.query_groups == 0

    def shape(self) -> dict[str, Any]:
        """Values of the fields that decide whether weights fit."""
        return self.model_dump(exclude={"preset", "dropout", "init_std", "embedding_std"})

    def differences(self, other: Model) -> dict[str, tuple[Any, Any]]:
        """Both values of every field of `shape` in which two models differ."""
        ours, theirs = self.shape(), other.shape()
        return {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs}
                if ours.get(key) != theirs.get(key)}

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused W_QKV, by query group: its queries, its key, its value."""
        return (self.heads + 2 * self.query_groups) * self.head_width

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary up to a multiple of 128 (tensor cores) and of the
        slices, so that shards are even and one checkpoint serves every tensor-parallel degree."""
        multiple = math.lcm(128, self.slices)
        return -(-self.vocab_size // multiple) * multiple

    @classmethod
    def usual_length(cls, max_positions: int) -> int:
        """Tokens of a sequence in training where nobody says it: as many as the model has learned
        positions, but not as many as it can rotate."""
        return max_positions if cls.positions == "learned" else min(max_positions, USUAL_LENGTH)

    def cut_like(self, other: Model) -> Model:
        """This model with as many slices of its weights as another, where a recipe may say them."""
        if "slices" not in type(self).model_fields or self.slices == other.slices:
            return self
        return self.model_copy(update={"slices": other.slices})

    def transformer_config(self) -> dict[str, Any]:
        """Keywords of Megatron-Core's `TransformerConfig`, the activation function left out."""
        return {
            "num_layers": self.layers, "hidden_size": self.hidden,
            "num_attention_heads": self.heads, "num_query_groups": self.query_groups,
            "kv_channels": self.head_width, "ffn_hidden_size": self.ffn_hidden,
            "gated_linear_unit": self.gated, "add_bias_linear": self.biases,
            "add_qkv_bias": self.qkv_bias, "qk_layernorm": self.qk_norm,
            "normalization": self.norm, "layernorm_epsilon": self.norm_eps,
            "hidden_dropout": self.dropout, "attention_dropout": self.dropout,
            "init_method_std": self.init_std,
        }

    def gpt_model(self) -> dict[str, Any]:
        """Keywords of Megatron-Core's `GPTModel`."""
        positions: dict[str, Any] = {"position_embedding_type": "learned_absolute"}
        if self.positions == "rotary":
            positions = {"position_embedding_type": "rope", "rotary_base": self.rotary_base,
                         "rope_scaling": self.rotary_scaling != 1.0,
                         "rope_scaling_factor": self.rotary_scaling}
        return {"vocab_size": self.padded_vocab, "max_sequence_length": self.max_positions,
                "share_embeddings_and_output_weights": self.tied, **positions}

    def weights(self) -> list[Weight]:
        """All parameters in model order; a tied LM head is the word embedding and not listed
        again.

        The rows of a gated W_I are, slice by slice, its gates and its ups. So a rank's shard is one
        piece of the whole weight, as of every other.
        """
        vocabulary, std = (self.padded_vocab, self.hidden), self.embedding_std or self.init_std
        first = [Weight(EMBEDDING, vocabulary, 0, -1, std)]
        if self.positions == "learned":
            shape = (self.max_positions, self.hidden)
            first.append(Weight(POSITIONS, shape, None, -1, std))
        layers = [w for layer in range(self.layers) for w in self._layer(layer)]
        last = self._norm("decoder.final_layernorm", self.layers)
        if not self.tied:
            last.append(Weight(HEAD, vocabulary, 0, self.layers, std))
        return first + layers + last

    def folded(self, name: str, embedding_output: float, head_input: float,
               queries: float) -> float | list[float]:
        """What a parameter is multiplied by to make a model without multipliers that computes the
        same.

        Args:
            name: canonical.
            embedding_output, head_input: multipliers of the embeddings' output and of the LM head's
                input.
            queries: multiplier of Q K^T / sqrt(head_width).

        Returns:
            A number, or one for each row.
        """
        if name.startswith("embedding."):
            return embedding_output
        if name.startswith("decoder.final_layernorm."):
            # a tied head is the embedding, which has been multiplied
            return head_input / embedding_output if self.tied else head_input
        if self.qk_norm:  # which undoes a multiplier of the rows
            return queries if HEAD_NORMS[0] in name else 1.0
        if ".linear_qkv." in name:
            group = [queries] * (self.heads // self.query_groups) + [1.0, 1.0]
            return [factor for factor in group for _ in range(self.head_width)] * self.query_groups
        return 1.0

    def _layer(self, layer: int) -> list[Weight]:
        at = f"decoder.layers.{layer}."
        residual_std = self.init_std / math.sqrt(2 * self.layers)

        def linear(name: str, matrices: list[int], inputs: int, axis: int,
                   spread: float) -> list[Weight]:
            out = sum(matrices)
            weight = Weight(f"{at}{name}.weight", (out, inputs), axis, layer, spread, linear=True,
                            matrices=tuple(matrices))
            bias = Weight(f"{at}{name}.bias", (out,), 0 if axis == 0 else None, layer)
            biased = self.biases or (self.qkv_bias and name.endswith("linear_qkv"))
            return [weight, bias] if biased else [weight]

        up = [self.ffn_hidden] * (2 if self.gated else 1)
        queries, keys = (n * self.head_width for n in (self.heads, self.query_groups))
        return [
            *self._norm(f"{at}input_layernorm", layer),
            *linear("self_attention.linear_qkv", [queries, keys, keys], self.hidden, 0,
                    self.init_std),
            *(self._head_norms(at, layer) if self.qk_norm else []),
            *linear("self_attention.linear_proj", [self.hidden], self.heads * self.head_width, 1,
                    residual_std),
            *self._norm(f"{at}pre_mlp_layernorm", layer),
            *linear("mlp.linear_fc1", up, self.hidden, 0, self.init_std),
            *linear("mlp.linear_fc2", [self.hidden], self.ffn_hidden, 1, residual_std),
        ]

    def _head_norms(self, at: str, layer: int) -> list[Weight]:
        return [w for name in HEAD_NORMS for w in self._norm(at + name, layer, self.head_width)]

    def _norm(self, name: str, layer: int, width: int | None = None) -> list[Weight]:
        parameters = ("weight", "bias") if self.norm == "LayerNorm" else ("weight",)
        return [Weight(f"{name}.{p}", (width or self.hidden,), None, layer) for p in parameters]


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return [*small, *(n // d for d in reversed(small) if d * d != n)]


ARCHITECTURES: Registry[type[Model]] = Registry("architecture", "megatron_spdf.architecture")
BY_ARCHITECTURE = ByName(ARCHITECTURES, "gpt", lambda family: family, key="architecture")
