"""SPDF's table of a user's own runs: FLOPs of pre-training and of fine-tuning, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_spdf.reports.document import escape, key, paragraph, table
from megatron_spdf.reports.runs import Logged


def own_table(runs: Sequence[Logged], colors: dict[Path, str]) -> str:
    """HTML table with a row for each pre-training run, and below it one for each fine-tuning of
    it."""
    metrics = sorted({name for run in runs for name in run.scores})
    head = ["run", "sparsity", "pre-training\n(FLOPs)", "fine-tuning\n(FLOPs)", "together",
            "speed-up\nover dense",
            "validation\nloss", *metrics]
    rows = []
    for run, start, together, speed_up in accounts(runs):
        indent = "&emsp;" if start else ""
        loss = run.validation_loss
        rows.append([
            f"{indent}{key(colors[run.directory])}{escape(run.label)}",
            f"{(start or run).sparsity:.2%}",
            _flops((start or run).flops if start or not run.fine_tunes else None),
            _flops(run.flops if run.fine_tunes else None), _flops(together),
            f"{speed_up:.2f}x" if speed_up else "-", "-" if loss is None else f"{loss:.4f}",
            *(f"{run.scores[m]:.4g}" if m in run.scores else "-" for m in metrics)])
    note = ("Speed-up: FLOPs of the dense run of the same model and tokens (fine-tuned on the same "
            "task) over these; sparsity is that of pre-training. FLOPs are forward and backward; "
            "the paper's of fine-tuning are forward.")
    return table(head, rows) + paragraph(note, "note")


def accounts(runs: Sequence[Logged]) -> list[tuple[Logged, Logged | None, float | None,
                                                   float | None]]:
    """Pairs fine-tuning runs with the pre-training runs they started from, and sums their FLOPs.

    Fine-tuning runs whose start is not among the runs come last and have no sums.

    Returns:
        (run, pre-training run it started from, FLOPs of both, speed-up over the dense counterpart).
    """
    pretrained = [r for r in runs if not r.fine_tunes]
    found: list[tuple[Logged, Logged | None, float | None, float | None]] = []
    for run in pretrained:
        dense = _dense_counterpart(run, pretrained)
        found.append((run, None, run.flops, dense.flops / run.flops if dense else None))
        for tuned in started_from(run, runs):
            together = run.flops + tuned.flops
            other = next((t for t in started_from(dense, runs) if _task(t) == _task(tuned)),
                         None) if dense else None
            found.append((tuned, run, together,
                          (dense.flops + other.flops) / together if dense and other else None))
    known = {id(run) for run, *_ in found}
    return found + [(run, None, None, None) for run in runs if id(run) not in known]


def started_from(run: Logged, runs: Sequence[Logged]) -> list[Logged]:
    """Fine-tuning runs whose checkpoint is this run or lies in its directory."""
    def starts_here(checkpoint: str | None) -> bool:
        return checkpoint is not None and Path(checkpoint).resolve().is_relative_to(run.directory)

    return [r for r in runs if starts_here(r.fine_tunes)]


def _task(run: Logged) -> object:
    return run.values.get("data", {}).get("task")


def _dense_counterpart(run: Logged, pretrained: Sequence[Logged]) -> Logged | None:
    """Dense run of the same model with the same tokens, which may be the run itself. None if
    missing."""
    def shape(other: Logged) -> tuple:
        model = other.values.get("model", {})
        return other.tokens, *(model.get(k)
                               for k in ("layers", "hidden", "heads", "ffn_hidden", "vocab_size"))

    return next((r for r in pretrained if r.sparsity == 0.0 and shape(r) == shape(run)), None)


def _flops(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
