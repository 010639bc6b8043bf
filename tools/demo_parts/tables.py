"""The demo's tables and its plot, from what its runs left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.spdf_table import accounts
from megatron_spdf.sparsity.plan import Plan


def pretraining_table(runs: dict[str, Logged]) -> str:
    """The runs side by side, with the ratio of the last to the first."""
    rows: dict[str, list[float]] = {}
    for run in runs.values():
        recipe = load_recipe(run.recipe)
        plan = Plan.of(recipe)
        losses = [r["loss"] for r in run.train]
        held = run.bytes
        state = held["parameters"] + held["gradients"] + held["optimizer"]
        for label, value in {
            "parameters, active (M)": _active_parameters(recipe, plan) / 1e6,
            "training loss, mean of the last tenth": mean(losses[-max(1, len(losses) // 10):]),
            "validation perplexity": run.valid[-1]["perplexity"],
            "tokens/s, median": run.tokens_per_second,
            "training FLOPs (1e12)": run.flops / 1e12,
            "weights + gradients + optimizer, rank 0 (MiB)": state / 2**20,
            "sent per step by rank 0, tensor parallel (MiB)": held["sent_per_step"] / 2**20,
            "sent per step and data-parallel rank* (MiB)": 2 * held["gradients"] / 2**20,
            "checkpoint on disk (MiB)": _checkpoint_bytes(run.directory) / 2**20,
        }.items():
            rows.setdefault(label, []).append(value)
    head = f"{'':<48}" + "".join(f"{name:>14}" for name in runs) + f"{'ratio':>9}"
    lines = [f"{label:<48}" + "".join(f"{v:>14,.2f}" for v in values)
             + f"{values[-1] / values[0]:>9.3f}"
             for label, values in rows.items()]
    note = ("* computed from the gradient buffers: gradients reduced and parameters gathered once "
            "a step, were there\n  more than one replica. Embeddings, norms and biases are dense, "
            "and large in a model this small.")
    return "\n".join([head, "-" * len(head), *lines, note])


def fine_tuning_table(runs: Sequence[Logged]) -> str:
    """The paper's table in small: FLOPs of both modes, and scores of the fine-tuned models."""
    metrics = ("BLEU", "ROUGE-L", "perplexity")
    head = (f"{'pre-trained':<14}{'fine-tuned':<12}{'pre-train':>14}{'fine-tune':>14}"
            f"{'together':>14}{'speed-up':>10}"
            + "".join(f"{m:>12}" for m in metrics))
    unit = f"{'':<26}" + f"{'(1e12 FLOPs)':>14}" * 3
    lines = []
    for run, start, together, speed_up in accounts(runs):
        if start is not None:
            sparsity = f"{start.sparsity:.0%} sparse" if start.sparsity else "dense"
            lines.append(
                f"{sparsity:<14}{run.values['mode']:<12}"
                + "".join(f"{flops / 1e12:>14.2f}" for flops in (start.flops, run.flops, together))
                + f"{speed_up:>9.2f}x" + "".join(f"{run.scores[m]:>12.4g}" for m in metrics))
    note = ("Synthetic table-to-text made by a grammar, test records not seen in training; one "
            "seed. BLEU in [0, 1];\nperplexity of the references. FLOPs are forward and backward.")
    return "\n".join([head, unit, "-" * len(head), *lines, note])


def plot_losses(runs: dict[str, Logged], path: Path) -> None:
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
    figure.savefig(path)


def _active_parameters(recipe: Recipe, plan: Plan) -> int:
    """Parameters that are not held at zero, without the padding of the vocabulary."""
    total = sum(w.numel for w in recipe.model.weights())
    copies = 1 if recipe.model.tied else 2
    padding = (recipe.model.padded_vocab - recipe.model.vocab_size) * recipe.model.hidden * copies
    return total - padding - plan.numel + plan.active


def _checkpoint_bytes(directory: Path) -> int:
    newest = max((directory / "checkpoints").iterdir())
    return sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
