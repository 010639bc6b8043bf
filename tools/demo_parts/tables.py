"""The demo's tables and its plot, from what its runs left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from megatron_spdf.files import save_figure
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.spdf_table import accounts
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.tables import Column, Table, Unit


def pretraining_table(runs: Mapping[str, Logged]) -> str:
    """The runs side by side, with the ratio of the second to the first, which is dense."""
    rows: dict[str, list[float]] = {}
    for run in runs.values():
        recipe = load_recipe(run.recipe)
        for label, value in {
            "parameters, active (M)": _active_parameters(recipe, Plan.of(recipe)) / 1e6,
            "training loss, last tenth": _last_tenth([r["loss"] for r in run.train]),
            "validation perplexity": run.perplexity or math.nan,
            "tokens/s, median": run.tokens_per_second,
            "training FLOPs (1e12)": run.flops / 1e12,
            "state of a rank (MiB)": (run.state_bytes or 0) / 2**20,
            "sent by a replica* (MiB/step)": 2 * run.bytes["gradients"] / 2**20,
            "checkpoint (MiB)": _checkpoint_bytes(run.directory) / 2**20,
        }.items():
            rows.setdefault(label, []).append(value)
    columns = [Column("", "label"), *(Column(name, form=",.2f") for name in runs),
               Column("static / dense", form=".3f")]
    table = Table(columns, [{"label": label, **dict(zip(runs, values, strict=True)),
                             "static / dense": values[1] / values[0]}
                            for label, values in rows.items()])
    note = """State: weights, gradients, optimizer. *Computed from the gradient buffers: gradients
reduced and parameters gathered once a step, were there replicas. Embeddings, norms and
biases are dense, and large in a model this small."""
    return f"{table.text()}\n{note}"


def fine_tuning_table(runs: Sequence[Logged], names: Mapping[str, str]) -> str:
    """The paper's table in small: FLOPs of both modes, and scores of the fine-tuned models.

    Args:
        names: directory of a pre-training run -> its name.
    """
    scale = Unit("1e12", 1e12)
    columns = [Column("pre-trained", lambda a: names[a.start.directory.name]),
               Column("fine-tuned", lambda a: a.run.values["mode"]),
               Column("FLOPs", "pretraining", ".2f", scale),
               Column("tuning", "fine_tuning", ".2f", scale),
               Column("speed-up", "speed_up", ".2f", suffix="x"),
               *(Column(name, lambda a, name=name: a.run.scores[name], ".3f")
                 for name in ("BLEU", "ROUGE-L", "perplexity"))]
    table = Table(columns, [account for account in accounts(runs) if account.start])
    note = """FLOPs forward and backward, by active weights; speed-up of both together. Synthetic
table-to-text, test records not seen in training; one seed. BLEU in [0, 1]; perplexity of
the references."""
    return f"{table.text()}\n{note}"


def plot_losses(runs: Mapping[str, Logged], path: Path) -> None:
    """Training and validation loss of every run against its training FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=140)
    for name, run in runs.items():
        flops = {step: flops / 1e12 for step, flops in run.at_steps("flops").items()}
        (line,) = axes.plot(flops.values(), [r["loss"] for r in run.train], alpha=0.35)
        valid = [r for r in run.valid if r["step"] in flops]
        axes.plot([flops[r["step"]] for r in valid], [r["loss"] for r in valid], "o-",
                  color=line.get_color(), label=name)
    axes.set(xlabel="training FLOPs (1e12)", ylabel="loss (nats per token)",
             title="Pre-training on Python's standard library: line training, points validation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def _last_tenth(values: list[float]) -> float:
    return mean(values[-max(1, len(values) // 10):])


def _active_parameters(recipe: Recipe, plan: Plan) -> int:
    """Parameters that are not held at zero, without the padding of the vocabulary."""
    total = sum(w.numel for w in recipe.model.weights())
    copies = 1 if recipe.model.tied else 2
    padding = (recipe.model.padded_vocab - recipe.model.vocab_size) * recipe.model.hidden * copies
    return total - padding - plan.numel + plan.active


def _checkpoint_bytes(directory: Path) -> int:
    newest = max((directory / "checkpoints").iterdir())
    return sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
