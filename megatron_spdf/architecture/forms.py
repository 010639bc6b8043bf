"""A decoder's parameters in the forms that other programs keep them in.

Whatever handles tensors here works on masks, which are tensors of bool, too. PyTorch is imported
where it is needed, since the planner goes without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Form:
    """One of our parameters as another program keeps it.

    Attributes:
        names, shapes: of its tensors there.
        split: makes them of our parameter.
        join: makes our parameter of them.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]


class Forms:
    """Forms of the parameters of a `Model`, whose base class this is.

    Attributes:
        title: of the family, in words.
        huggingface: its `model_type` in transformers; None: transformers has none like it.
        huggingface_prefix: of names in transformers, which a model without LM head does not have.
        huggingface_ignored: ends of names there that hold nothing of ours.
    """

    title: ClassVar[str]
    huggingface: ClassVar[str | None] = None
    huggingface_prefix: ClassVar[str] = ""
    huggingface_ignored: ClassVar[tuple[str, ...]] = ()

    def huggingface_config(self) -> dict[str, Any]:
        """Keywords of transformers' configuration of this model, tokens and dtype left out.

        Raises:
            ValueError: transformers cannot compute what this model does.
        """
        raise ValueError(f"model.architecture={self.name} has no counterpart in Hugging Face's "
                         "transformers; convert it to Megatron-LM, or export another architecture")

    def huggingface_legacy(self) -> dict[str, Any]:
        """Keys of a config.json that transformers 5 writes in another place than release 4 reads.
        """
        return {}

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> Forms:
        """The model of a config.json of this `model_type`.

        Raises:
            ValueError: what it has that this family does not compute; begins with "has".
        """
        raise NotImplementedError

    def huggingface_form(self, weight: Any) -> Form:
        """A parameter's form in transformers."""
        raise NotImplementedError

    def vocabulary(self, name: str) -> Form:
        """The embedding or LM head under a name, without padding."""
        return Form((name,), ((self.vocab_size, self.hidden),),
                    lambda tensor: [tensor[: self.vocab_size]],
                    lambda tensors: pad_vocabulary(tensors[0], self.padded_vocab))

    def split_qkv(self, fused: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of all heads, of W_QKV or its bias."""
        groups = fused.unflatten(0, (self.query_groups, -1, self.head_width))
        parts = groups.split([self.heads // self.query_groups, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]

    def join_qkv(self, parts: Sequence[Tensor]) -> Tensor:
        """`split_qkv` undone."""
        groups = [p.unflatten(0, (self.query_groups, -1, self.head_width)) for p in parts]
        return concatenate(groups, 1).flatten(0, 2)

    def split_gates(self, fused: Tensor) -> Sequence[Tensor]:
        """Gates and ups of all slices, of a gated W_I or its bias."""
        both = fused.unflatten(0, (self.slices, 2, -1))
        return [part.flatten(0, 1) for part in both.unbind(1)]

    def join_gates(self, parts: Sequence[Tensor]) -> Tensor:
        """`split_gates` undone."""
        both = [part.unflatten(0, (self.slices, 1, -1)) for part in parts]
        return concatenate(both, 1).flatten(0, 2)

    def matrices(self, read: Callable[[str], Tensor],
                 layer: int) -> Iterator[tuple[str, Tensor]]:
        """Name and dense weight (out, in) of each matrix of a layer.

        Args:
            read: canonical name -> dense weight.
        """
        at = f"decoder.layers.{layer}."
        qkv = self.split_qkv(read(f"{at}self_attention.linear_qkv.weight"))
        yield from zip(("W_Q", "W_K", "W_V"), qkv, strict=True)
        yield "W_D", read(f"{at}self_attention.linear_proj.weight")
        up = read(f"{at}mlp.linear_fc1.weight")
        if self.gated:
            yield from zip(("W_I gate", "W_I up"), self.split_gates(up), strict=True)
        else:
            yield "W_I", up
        yield "W_O", read(f"{at}mlp.linear_fc2.weight")

    def matrix_of_rows(self, weight: Any) -> Tensor:
        """The number of the matrix, as `matrices` counts them, that each row of a linear weight is
        of: (out,)."""
        import torch

        found = torch.zeros(weight.shape[0], dtype=torch.int64)
        others = {w.name: w for w in self.weights() if w.layer == weight.layer}

        def rows(name: str) -> Tensor:
            """Numbers of the weight's rows, (out, 1); those of other weights are -1."""
            count = others[name].shape[0]
            numbers = torch.arange(count) if name == weight.name else torch.full((count,), -1)
            return numbers.view(-1, 1)

        for number, (_, matrix) in enumerate(self.matrices(rows, weight.layer)):
            own = matrix.flatten()
            found[own[own >= 0]] = number
        return found

    def to_megatron(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter as Megatron-LM has it: the rows of a gated W_I are all gates, then all
        ups."""
        gates = self.gated and ".linear_fc1." in name
        return concatenate(self.split_gates(tensor)) if gates else tensor

    def from_megatron(self, name: str, tensor: Tensor) -> Tensor:
        """`to_megatron` undone."""
        gates = self.gated and ".linear_fc1." in name
        return self.join_gates(tensor.chunk(2)) if gates else tensor

    def megatron_arguments(self) -> list[str]:
        """Megatron-LM's arguments for a model like this; its default, --bias-gelu-fusion, is GELU's
        tanh approximation."""
        learned = self.positions == "learned"
        words = [f"--num-layers {self.layers}", f"--hidden-size {self.hidden}",
                 f"--ffn-hidden-size {self.ffn_hidden}", f"--num-attention-heads {self.heads}",
                 f"--max-position-embeddings {self.max_positions}",
                 f"--position-embedding-type {'learned_absolute' if learned else 'rope'}"]
        if not learned:
            base = self.rotary_base
            # Megatron-LM reads a whole number there, and no 1e+06
            words.append(f"--rotary-base {int(base) if base == int(base) else base}")
            if self.rotary_scaling != 1.0:
                words += ["--use-rope-scaling", f"--rope-scaling-factor {self.rotary_scaling:g}"]
        if self.head_width * self.heads != self.hidden:
            words.append(f"--kv-channels {self.head_width}")
        if self.query_groups != self.heads:
            words += ["--group-query-attention", f"--num-query-groups {self.query_groups}"]
        if self.norm != "LayerNorm":
            words.append(f"--normalization {self.norm}")
        if self.norm_eps != 1e-5:
            words.append(f"--norm-epsilon {self.norm_eps:g}")
        flags = {"--swiglu": self.gated, "--disable-bias-linear": not self.biases,
                 "--add-qkv-bias": self.qkv_bias, "--qk-layernorm": self.qk_norm,
                 "--untie-embeddings-and-output-weights": not self.tied}
        return words + [flag for flag, given in flags.items() if given]


# Types of transformers that no family here computes, and why.
UNLIKE = {
    ".*moe.*|mixtral|deepseek_v[23].*|llama4.*|gpt_oss": "a mixture of experts",
    "gemma.*": "whose norms multiply by 1 + weight and whose embeddings are scaled",
    "olmo[23]": "whose norms follow attention and feed-forward, and span all heads of a query",
    "phi3?|gpt_neox|stablelm|glm.*": "which rotates a part of each head or norms otherwise",
    "mamba.*|jamba|zamba.*|qwen3_next": "which has layers other than attention",
}


class UnknownFamily(ValueError):
    """A model_type of transformers that no family here has, or that more than one can read."""


def model_of(config: dict[str, Any], families: Sequence[type[Forms]]) -> Forms:
    """The model of a config.json. Where several families have its `model_type`, it is of the one
    that computes what the configuration says.

    Raises:
        UnknownFamily: no family has this `model_type`, or several compute what it says.
        ValueError: see `Forms.from_huggingface`.
    """
    kind = config.get("model_type")
    claiming = [family for family in families if family.huggingface and family.huggingface == kind]
    if not claiming:
        known = sorted({family.huggingface for family in families if family.huggingface})
        why = next((f", {reason}" for name, reason in UNLIKE.items()
                    if isinstance(kind, str) and re.fullmatch(name, kind)), "")
        raise UnknownFamily(f"is a model of type {kind!r}{why}; those that can be read are "
                            f"{', '.join(known)}")
    models, refused = [], []
    for family in claiming:
        try:
            models.append(family.from_huggingface(config))
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}={e['input']!r:.40}, where "
                     f"{e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors())
            refused.append(f"makes no model, of {'; '.join(wrong)}; use the config.json of the "
                           "weights")
        except ValueError as error:
            refused.append(str(error))
    if len(models) > 1:
        named = " and ".join(f"{type(model).name!r}" for model in models)
        raise UnknownFamily(f"is a model of type {kind!r}, which the architectures {named} both "
                            "read; leave one of them out, or let its from_huggingface refuse what "
                            "is the other's")
    if not models:
        raise ValueError("; and ".join(refused))
    return models[0]


def pad_vocabulary(rows: Tensor, number: int) -> Tensor:
    """An embedding with `number` rows, those past the vocabulary being the mean of it.

    Ours take no part in the softmax over the LM head, but Megatron-LM's do. Trained models have
    logits far below zero, so rows of zeros would win it. The logit of the mean row is the mean
    logit, and n such tokens have at most n / vocabulary of the others' weight, since exp(mean) <=
    mean(exp).
    """
    padding = number - len(rows)
    assert padding >= 0, (number, rows.shape)
    mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return concatenate([rows, mean.expand(padding, -1)]) if padding else rows


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after the other."""
    import torch

    return torch.cat(list(tensors), axis)
