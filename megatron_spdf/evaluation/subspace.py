"""Distance that fine-tuning moves each weight: cosine distance per layer and matrix.

Source: Thangarasa et al. 2023, section 3.4.

Shapes: G query groups, q queries of a group, D head size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_spdf.architecture.base import Model
from megatron_spdf.convert.source import WeightSource
from megatron_spdf.tables import Column, Table

MATRICES = ("W_Q", "W_K", "W_V", "W_D", "W_I", "W_O")
_SINGLE = {"W_D": "self_attention.linear_proj", "W_I": "mlp.linear_fc1", "W_O": "mlp.linear_fc2"}


def distances(before: WeightSource, after: WeightSource) -> list[dict[str, float]]:
    """Cosine distance of each layer's matrices between two models.

    Computed as 1 - <A, B> / (|A| |B|) over the entries of the two dense matrices, in float64.

    Returns:
        For each layer, matrix -> distance.

    Raises:
        ValueError: the models have different shapes, or a weight is missing or damaged.
    """
    differ = [f"{key} is {one} and {other}"
              for key, (one, other) in before.model.differences(after.model).items()
              if key not in ("vocab_size", "max_positions")]
    if differ:
        raise ValueError(
            f"{before.path} and {after.path} are different models: {'; '.join(differ)}"
        )
    return [{name: cosine_distance(a, b) for (name, a), (_, b) in zip(
        matrices(before, layer), matrices(after, layer), strict=True)}
            for layer in range(before.model.layers)]


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """Cosine distance of two tensors of one shape, as vectors: 0 if parallel, 1 if orthogonal.

    Computed from the difference of the unit vectors, |a - b|^2 / 2, so that a distance of 1e-10 is
    not lost in 1 - cos.
    """
    norms = [float(t.double().norm()) for t in (a, b)]
    if 0.0 in norms:
        return 0.0 if norms[0] == norms[1] else 1.0
    return float((a.double() / norms[0] - b.double() / norms[1]).square().sum()) / 2


def matrices(source: WeightSource, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yields name and dense weight (out, in) of each matrix of a layer, in the order of
    MATRICES."""
    qkv = source.weight(f"decoder.layers.{layer}.self_attention.linear_qkv.weight")
    yield from zip(MATRICES, split_qkv(qkv, source.model), strict=False)
    for name, module in _SINGLE.items():
        yield name, source.weight(f"decoder.layers.{layer}.{module}.weight")


def split_qkv(weight: Tensor, model: Model) -> tuple[Tensor, ...]:
    """Splits the fused weight (G (q + 2) D, H) into W_Q (G q D, H), W_K (G D, H) and W_V (G D, H).

    Its rows are grouped by query group: queries of the group's heads, key, value.
    """
    head = model.hidden // model.heads
    per_group = model.heads // model.query_groups
    grouped = weight.view(model.query_groups, per_group + 2, head, -1)  # (G, q + 2, D, H)
    return tuple(part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], dim=1))


def render(layers: list[dict[str, float]]) -> str:
    """Formats a row for each layer and the mean of all."""
    mean = {name: sum(row[name] for row in layers) / len(layers) for name in MATRICES}
    rows = [{"layer": number, **row} for number, row in enumerate(layers)]
    columns = [Column("layer"), *(Column(name, form=".3e") for name in MATRICES)]
    return Table(columns, [*rows, {"layer": "mean", **mean}]).text()


def draw(layers: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws the distances as a heat map: layers from left to right, matrices from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = torch.tensor([[row[name] for row in layers] for name in MATRICES]).numpy()
    figure, axes = pyplot.subplots(figsize=(max(5.0, 0.4 * len(layers) + 2), 3.2), dpi=140)
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set(xlabel="layer", yticks=range(len(MATRICES)), yticklabels=MATRICES,
             xticks=range(len(layers)), title=title)
    figure.colorbar(image, label="cosine distance")
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)
