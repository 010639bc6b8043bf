"""Coordinate check: size of the activations, layer by layer, in the first steps of training.

Under a correct parametrization sizes depend on neither width nor density (Yang et al. 2021,
appendix D.1; Dey et al. 2024, figure 3).

Shapes: T tokens of a sequence, B sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.files import save_figure
from megatron_spdf.model.decoder import Decoder
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.sparsity.plan import Plan

Sizes = dict[str, float]


def activation_sizes(recipe: Recipe, steps: int) -> list[Sizes]:
    """Measures mean |x| of each part's output in the forward pass of the first steps, on one rank.

    Args:
        recipe: of the run; names model, data and parametrization.
        steps: number of training steps.

    Returns:
        For each step, part -> size. Parts are "embedding", "layer N attention" and "layer N mlp"
        (what they add to the residual stream), and "logits".
    """
    plan = Plan.of(recipe)
    corpus = check_corpus(recipe)
    engine = make_engine(recipe, plan, init_distributed(find_ranks(), recipe))
    data = TokenData(recipe, corpus, Path(recipe.output) / "cache", reads=True)
    found = []
    with _recorded(engine.models[0], recipe.model.vocab_size) as sizes:
        for number, batch in zip(range(1, steps + 1), data.training_batches(0), strict=False):
            sizes.clear()
            engine.step(batch, number, number * recipe.tokens_per_step, stop_requested=False)
            found.append({place: sum(values) / len(values) for place, values in sizes.items()})
    destroy()
    return found


@contextmanager
def _recorded(model: Decoder, vocab_size: int) -> Iterator[dict[str, list[float]]]:
    """Yields part -> mean |output| of every forward pass while hooks are installed."""
    sizes: dict[str, list[float]] = {}

    def watch(place: str, module: nn.Module, columns: int | None = None):
        def record(_, __, output: Tensor | tuple[Tensor, Tensor | None]) -> None:
            parts = [part.detach().float() for part in _tensors(output)]
            sizes.setdefault(place, []).append(float(sum(parts)[..., :columns].abs().mean()))
        return module.register_forward_hook(record)

    places = [("embedding", model.embedding)]
    for number, layer in enumerate(model.decoder.layers):
        places += [(f"layer {number} attention", layer.self_attention),
                   (f"layer {number} mlp", layer.mlp)]
    hooks = [watch(*place) for place in places] + [watch("logits", model.output_layer, vocab_size)]
    # A training step computes its loss without calling the output layer, so the hook does.
    hooks.append(model.decoder.final_layernorm.register_forward_hook(
        lambda _, __, x: _score(model, x)))
    try:
        yield sizes
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _score(model: Decoder, x: Tensor) -> None:
    """Lets the LM head compute the logits of x (T, B, H)."""
    model.output_layer(x, model.head_weight)


def _tensors(output: Tensor | tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """Splits a module's output into tensors: the output, and a bias that is still to be added to
    it."""
    together = output if isinstance(output, tuple) else (output,)
    return [part for part in together if isinstance(part, Tensor)]


def scaling_exponents(sizes: dict[float, Sizes]) -> dict[str, float]:
    """Fits the slope of log size over log scale for each part. A slope of 0 is independence of the
    scale.

    Args:
        sizes: scale (a width or a density) -> sizes at one step.
    """
    scales = torch.tensor(sorted(sizes), dtype=torch.float64).log2()
    centered = scales - scales.mean()
    found = {}
    for place in sizes[min(sizes)]:
        values = torch.tensor([sizes[scale][place] for scale in sorted(sizes)],
                              dtype=torch.float64).log2()
        found[place] = float((centered * values).sum() / (centered * centered).sum())
    return found


def plot_sizes(found: dict[str, dict[str, dict[float, Sizes]]], path: Path) -> None:
    """Plots size against scale, one line for each part of the model.

    Args:
        found: parametrization -> scaled quantity ("width", "density") -> scale -> sizes at the last
            step.
        path: picture to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rules, scaled = list(found), list(next(iter(found.values())))
    figure, axes = pyplot.subplots(len(rules), len(scaled),
                                   figsize=(5 * len(scaled), 3.6 * len(rules)), dpi=140,
                                   squeeze=False, sharey="col")
    for row, rule in zip(axes, rules, strict=True):
        for place, what in zip(row, scaled, strict=True):
            sizes = found[rule][what]
            for part in sizes[min(sizes)]:
                place.plot(sorted(sizes), [sizes[s][part] for s in sorted(sizes)], "o-",
                           markersize=3, label=part)
            place.set(xscale="log", yscale="log", xlabel=what, ylabel="mean |activation|",
                      title=f"{rule}, {what}")
            place.set_xticks(sorted(sizes), [f"{s:g}" for s in sorted(sizes)])
            place.minorticks_off()
            place.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    save_figure(figure, path)
