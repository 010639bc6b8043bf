"""A decoder of which one layer at a time is in memory: its layers are the one layer of a model of
the same family, filled anew.

Whatever a family computes, it computes with the modules that it trains with. Weights are those of a
standard model in float32, `convert.source.WeightSource.master`.

Shapes: T tokens of a sequence, B sequences, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_spdf.model.attention import document_mask
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.model.decoder import build_model, canonical_modules
from megatron_spdf.model.head import head_loss
from megatron_spdf.model.init import LoadedWeights, initialize
from megatron_spdf.recipe.recipe import Kernels, Parallel, Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.settings import Sparsity

_AT = "decoder.layers.0."
Extras = dict[str, Any]  # what Megatron-Core gives a layer beside hidden states


def single_layer(recipe: Recipe) -> Recipe:
    """The recipe of a dense model of one layer, for float32 on one rank."""
    model = recipe.model.model_copy(update={"layers": 1, "dropout": 0.0})
    train = recipe.train.model_copy(update={"precision": "fp32", "recompute": "none"})
    return recipe.model_copy(update={"model": model, "train": train, "parallel": Parallel(),
                                     "sparsity": Sparsity(), "stages": [], "kernels": Kernels(),
                                     "parametrization": "standard"})


class _Arrived(Exception):
    """The hidden states before the first layer are known."""


class LayerByLayer:
    """Embedding, head and one layer of a decoder, in float32 and for inference.

    Args:
        recipe: of the model; layout, sparsity, precision and parametrization do not matter.
        read: canonical name -> whole dense weight of the standard model.

    Attributes:
        layer: number of the layer that is in memory.
    """

    def __init__(self, recipe: Recipe, read: Callable[[str], Tensor]):
        self.recipe, self.layer, self._read = single_layer(recipe), 0, read
        self._source = LoadedWeights(self._read_here)
        (self.model,) = build_model(self.recipe, Plan(0, {}), self._source)
        self.model.eval().requires_grad_(False)
        self._weights = {w.name: w for w in self.recipe.model.weights()}

    def load(self, layer: int) -> None:
        """Fills the layer with the weights of another one."""
        self.layer = layer
        for name, module in canonical_modules(self.model):
            if name.startswith(_AT):
                initialize(module, name, self._weights, self._source, 0, 1)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the layer that is in memory, by its canonical name in the whole model."""
        return self.model.get_parameter(re.sub(r"^decoder\.layers\.\d+\.", _AT, name))

    @torch.no_grad()
    def embed(self, micro: MicroBatch) -> tuple[Tensor, Extras]:
        """Hidden states (T, B, H) before the first layer, and what every layer gets beside them."""
        found: Extras = {}

        def stop(_, arguments: tuple, keywords: Extras) -> None:
            assert not arguments, "Megatron-Core calls layers with keywords"
            found.update(keywords)
            raise _Arrived

        mask = document_mask(micro["documents"]) if "documents" in micro else None
        hook = self._module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(micro["tokens"], micro["position_ids"], mask)
        except _Arrived:
            return found.pop("hidden_states"), found
        finally:
            hook.remove()
        raise AssertionError("Megatron-Core calls every layer")

    @torch.no_grad()
    def forward(self, hidden: Tensor, extras: Extras) -> Tensor:
        """Hidden states (T, B, H) after the layer that is in memory."""
        return self._module(hidden_states=hidden, **extras)[0]

    @torch.no_grad()
    def loss(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Sum of the cross entropy of a micro-batch's tokens, (), in nats.

        Args:
            hidden: after the last layer.
        """
        return head_loss(self.model.decoder.final_layernorm(hidden), self.model.head_weight,
                         micro["labels"], micro["loss_mask"], self.recipe.model.vocab_size)

    @contextmanager
    def watched(self, watchers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Shows the inputs of weights of the layer, (T B, in), while it is entered.

        Args:
            watchers: canonical name of a weight in the whole model -> whom its inputs are shown to.
        """
        hooks = []
        for name, watcher in watchers.items():
            module = self.model.get_submodule(
                re.sub(r"^decoder\.layers\.\d+\.", _AT, name).removesuffix(".weight"))
            hooks.append(module.register_forward_pre_hook(
                lambda _, inputs, watcher=watcher: watcher(inputs[0].flatten(0, -2))))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _module(self) -> nn.Module:
        return self.model.decoder.layers[0]

    def _read_here(self, name: str) -> Tensor:
        """The weight that is to take a place in the model of one layer."""
        if name.startswith(_AT):
            name = f"decoder.layers.{self.layer}.{name.removeprefix(_AT)}"
        return self._read(name)
