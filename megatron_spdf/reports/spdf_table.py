"""SPDF's table of a user's own runs: FLOPs of pre-training and of fine-tuning, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_spdf.paths import real
from megatron_spdf.reports.document import escape, key, paragraph
from megatron_spdf.reports.pens import Pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.tables import Column, Html, Table

MOST_SCORES = 6  # that have columns beside the FLOPs


def own_table(runs: Sequence[Logged], pens: dict[Path, Pen]) -> str:
    """HTML table with a row for each pre-training run, and below it one for each fine-tuning of
    it. Scores have a table of their own where there are many."""
    metrics = sorted({name for run in runs for name in run.scores})
    beside = metrics if len(metrics) <= MOST_SCORES else []
    columns = [
        Column("run", lambda a: Html(f"{'&emsp;' if a.start else ''}{key(pens[a.run.directory])}"
                                     f"{escape(a.run.label)}"), wraps=True),
        Column("sparsity", lambda a: (a.start or a.run).sparsity, ".2%"),
        Column("pre-training (FLOPs)", "pretraining", ".4g"),
        Column("fine-tuning (FLOPs)", "fine_tuning", ".4g"), Column("together", form=".4g"),
        Column("speed-up over dense", "speed_up", ".2f", suffix="x"),
        Column("validation loss", lambda a: a.run.validation_loss, ".4f"),
        *(Column(name, lambda a, name=name: a.run.scores.get(name), ".4g") for name in beside)]
    note = ("Speed-up: FLOPs of the dense run of the same model and tokens (fine-tuned on the same "
            "task) over these; sparsity is that of pre-training. FLOPs are forward and backward; "
            "the paper's of fine-tuning are forward.")
    below = "" if beside else _scores_table([run for run in runs if run.scores], metrics)
    return Table(columns, accounts(runs)).html() + below + paragraph(note, "note")


def _scores_table(runs: Sequence[Logged], metrics: Sequence[str]) -> str:
    """HTML table with a row for each metric and a column for each run."""
    if not metrics:
        return ""
    columns = [Column("score", lambda name: name, wraps=True),
               *(Column(run.label, lambda name, run=run: run.scores.get(name), ".4g")
                 for run in runs)]
    return Table(columns, metrics).html("Scores")


class Account(NamedTuple):
    """FLOPs of a run.

    Attributes:
        run: pre-training or fine-tuning run.
        start: pre-training run that a fine-tuning run started from, if it is known.
        together: FLOPs of both.
        speed_up: over the dense counterpart.
    """

    run: Logged
    start: Logged | None
    together: float | None
    speed_up: float | None

    @property
    def pretraining(self) -> float | None:
        """FLOPs of pre-training. None for a fine-tuning run without a known start."""
        if self.start:
            return self.start.flops
        return None if self.run.fine_tunes else self.run.flops

    @property
    def fine_tuning(self) -> float | None:
        """FLOPs of fine-tuning. None for pre-training."""
        return self.run.flops if self.run.fine_tunes else None


def accounts(runs: Sequence[Logged]) -> list[Account]:
    """Pairs fine-tuning runs with the pre-training runs they started from, and sums their FLOPs.

    Fine-tuning runs whose start is not among the runs come last and have no sums.
    """
    pretrained = [r for r in runs if not r.fine_tunes]
    found: list[Account] = []
    for run in pretrained:
        dense = _dense_counterpart(run, pretrained)
        found.append(Account(run, None, run.flops, dense.flops / run.flops if dense else None))
        for tuned in started_from(run, runs):
            together = run.flops + tuned.flops
            other = next((t for t in started_from(dense, runs) if _task(t) == _task(tuned)),
                         None) if dense else None
            found.append(Account(
                tuned, run, together,
                (dense.flops + other.flops) / together if dense and other else None))
    known = {id(account.run) for account in found}
    return found + [Account(run, None, None, None) for run in runs if id(run) not in known]


def started_from(run: Logged, runs: Sequence[Logged]) -> list[Logged]:
    """Fine-tuning runs whose checkpoint is this run or lies in its directory."""
    def starts_here(checkpoint: str | None) -> bool:
        return checkpoint is not None and real(checkpoint).is_relative_to(run.directory)

    return [r for r in runs if starts_here(r.fine_tunes)]


def start_of(run: Logged, runs: Sequence[Logged]) -> Logged | None:
    """Run whose checkpoint a fine-tuning run started from. None if it is not among the runs."""
    return next((other for other in runs if started_from(other, [run])), None)


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
