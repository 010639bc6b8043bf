"""Distance that fine-tuning moves each weight: cosine distance per layer and matrix.

Source: Thangarasa et al. 2023, section 3.4.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_spdf.convert.source import WeightSource
from megatron_spdf.files import save_figure
from megatron_spdf.tables import Column, Table
from megatron_spdf.text import label


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
              if key not in ("vocab_size", "max_positions", "slices")]
    if differ:
        raise ValueError(
            f"{before.path} and {after.path} are different models: {'; '.join(differ)}"
        )
    def of_layer(layer: int) -> dict[str, float]:
        both = [source.model.matrices(source.weight, layer) for source in (before, after)]
        return {name: cosine_distance(a, b) for (name, a), (_, b) in zip(*both, strict=True)}

    return [of_layer(layer) for layer in range(before.model.layers)]


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """Cosine distance of two tensors of one shape, as vectors: 0 if parallel, 1 if orthogonal.

    Computed from the difference of the unit vectors, |a - b|^2 / 2, so that a distance of 1e-10 is
    not lost in 1 - cos.
    """
    norms = [float(t.double().norm()) for t in (a, b)]
    if 0.0 in norms:
        return 0.0 if norms[0] == norms[1] else 1.0
    return float((a.double() / norms[0] - b.double() / norms[1]).square().sum()) / 2


def render(layers: list[dict[str, float]]) -> str:
    """Formats a row for each layer and the mean of all."""
    mean = {name: sum(row[name] for row in layers) / len(layers) for name in layers[0]}
    rows = [{"layer": number, **row} for number, row in enumerate(layers)]
    columns = [Column("layer"), *(Column(name, form=".3e") for name in layers[0])]
    return Table(columns, [*rows, {"layer": "mean", **mean}]).text()


def draw(layers: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws the distances as a heat map: layers from left to right, matrices from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = torch.tensor([[row[name] for row in layers] for name in layers[0]]).numpy()
    figure, axes = pyplot.subplots(figsize=(max(5.0, 0.4 * len(layers) + 2), 3.2), dpi=140)
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set(xlabel="layer", yticks=range(len(layers[0])), yticklabels=list(layers[0]),
             xticks=range(len(layers)), title="\n".join(map(label, title.split("\n"))))
    figure.colorbar(image, label="cosine distance")
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)
