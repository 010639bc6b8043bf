"""Selection of weights layer by layer: each layer's inputs are those that the pruned layers before
it give, and one layer is in memory.

So do the codes of SparseGPT and Wanda: the weights of a layer see the inputs that the dense layer
has, all are pruned, and the pruned layer's outputs go on. Other text goes through the dense and
through the pruned layers, for the perplexity of both.

Shapes: T tokens of a sequence, B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from megatron_spdf.convert.calibration import CheckedText, Sequences
from megatron_spdf.convert.source import WeightSource
from megatron_spdf.data.indexed.tokens import IndexedTokens
from megatron_spdf.data.pretraining.samples import DocumentBoundaries, boundaries_of
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.engine.common import to_device
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.model.layer_by_layer import Extras, LayerByLayer
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Parallel, Recipe
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.selectors.base import Inputs, Selector
from megatron_spdf.sparsity.slices import join_slices

BATCH_TOKENS = 2048  # that go through a layer together
Selected = tuple[Tensor, np.ndarray]  # dense values (out, in), masks (slices, entries) bool
# weight by name, its dense values in the standard model, what was kept of its inputs
Choose = Callable[[str, Tensor, Inputs | None], Selected]


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats per token before and after pruning, and what it was measured on."""

    dense: float
    pruned: float
    text: Sequences


class LayerwisePruning:
    """Weights of a model as they are selected, one layer after the other.

    Args:
        source: of the weights.
        recipe: of the run to come.
        plan: its sparsity.
        selector: keeps what `choose` needs of the inputs.
        choose: selects the entries of a weight.
        text: that is checked.
        device: that computes.
    """

    def __init__(self, source: WeightSource, recipe: Recipe, plan: Plan, selector: Selector,
                 choose: Choose, text: CheckedText, device: torch.device):
        self._plan, self._selector, self._choose = plan, selector, choose
        self._text, self._device = text, device
        self._layers = source.model.layers
        self._of_layer = [[w.name for w in source.weights.values() if w.layer == layer
                           and w.name in plan.weights] for layer in range(self._layers)]
        self._decoder = LayerByLayer(recipe, source.master)
        boundaries = boundaries_of(recipe, text.tokenizer)
        seen = text.calibrate if selector.calibrated else None
        self._calibration, self._dense, self._pruned = (
            _Stream(self._decoder, _batches(sequences, boundaries, text.tokenizer), device)
            for sequences in (seen, text.evaluate, text.evaluate))
        self._next, self._selected = 0, dict[str, Selected]()

    def of(self, name: str) -> Selected:
        """The values of a weight and its masks. Layers are asked for in their order."""
        while name not in self._selected:
            assert self._next < self._layers, f"{name} was selected, and has been let go of"
            self._prune_next()
        return self._selected[name]

    def losses(self) -> Losses:
        """The losses of the whole model, after its last layer."""
        while self._next < self._layers:
            self._prune_next()
        return Losses(self._dense.loss(), self._pruned.loss(), self._text.evaluate)

    def _prune_next(self) -> None:
        layer, self._selected = self._next, {}
        if layer:  # the first came with the model
            self._decoder.load(layer)
        self._dense.advance()
        inputs = self._inputs(self._of_layer[layer])
        for name in self._of_layer[layer]:
            parameter = self._decoder.parameter(name)
            dense = parameter.detach().clone()
            if not self._selector.calibrated:
                dense = dense.cpu()
            values, masks = self._choose(name, dense, inputs.pop(name, None))
            self._selected[name] = values.cpu(), masks
            mask = join_slices(torch.from_numpy(masks), self._plan.weights[name])
            parameter.copy_(values * mask.to(values.device))
        self._calibration.advance()
        self._pruned.advance()
        self._next += 1

    def _inputs(self, names: list[str]) -> dict[str, Inputs]:
        """What the selector keeps of the inputs of weights of the layer in memory."""
        if not self._selector.calibrated:
            return {}
        kept = {name: self._selector.inputs(self._plan.weights[name].shape[1], self._device)
                for name in names}
        with self._decoder.watched({name: inputs.add for name, inputs in kept.items()}):
            for _ in self._calibration.outputs():
                pass
        return kept


class _Stream:
    """Text on its way through the layers, its hidden states in the host's memory."""

    def __init__(self, decoder: LayerByLayer, batches: list[MicroBatch], device: torch.device):
        self._decoder, self._batches, self._device = decoder, batches, device
        self._hidden: list[Tensor] = []
        self._extras: list[Extras] = []
        for micro in self._batches:
            hidden, extras = decoder.embed(to_device(micro, device))
            self._hidden.append(hidden.cpu())
            self._extras.append(extras)

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (T, B, H) of each batch after the layer in memory."""
        for hidden, extras in zip(self._hidden, self._extras, strict=True):
            yield self._decoder.forward(hidden.to(self._device), extras)

    def advance(self) -> None:
        """Goes through the layer in memory.

        Raises:
            ValueError: what comes out is not finite.
        """
        for number, hidden in enumerate(self.outputs()):
            self._hidden[number] = hidden.cpu()
            if not hidden.isfinite().all():
                raise ValueError(f"layer {self._decoder.layer} gives numbers on the text that are "
                                 "not finite; use a model that has not diverged")

    def loss(self) -> float:
        """Mean loss in nats per token, after the last layer."""
        total = sum(float(self._decoder.loss(hidden.to(self._device),
                                             to_device(micro, self._device)))
                    for hidden, micro in zip(self._hidden, self._batches, strict=True))
        return total / sum(float(micro["loss_mask"].sum()) for micro in self._batches)


def _batches(sequences: Sequences | None, boundaries: DocumentBoundaries,
             tokenizer: Tokenizer) -> list[MicroBatch]:
    """Sequences in batches of about `BATCH_TOKENS`."""
    if sequences is None:
        return []
    tokens = IndexedTokens(sequences.prefix, tokenizer.vocab_size)
    samples = [boundaries.sample(tokens.read(int(start), sequences.length + 1))
               for start in sequences.starts]
    size = max(1, BATCH_TOKENS // sequences.length)
    return [default_collate(samples[i : i + size]) for i in range(0, len(samples), size)]


@contextmanager
def single_process(recipe: Recipe) -> Iterator[torch.device]:
    """Megatron-Core's process groups for this process alone, while it is entered; the device."""
    alone = recipe.model_copy(update={"parallel": Parallel()})
    device = init_distributed(Ranks(0, 1, 0, "python"), alone)
    try:
        yield device
    finally:
        destroy()
