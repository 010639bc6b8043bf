"""Grids of runs: every combination of the labels of some axes, each in a run directory of its own.

An axis has labels, and a label gives values to keys of the recipe. `optimizer.lr: [1e-4, 5e-5]` is
short for an axis of that name whose labels are the values.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spdf import exit_codes
from megatron_spdf.files import open_to_append

Axes = Mapping[str, Mapping[str, Mapping[str, Any]]]  # name -> label -> key of the recipe -> value


@dataclass(frozen=True)
class Trial:
    """One run of a grid.

    Attributes:
        labels: axis -> label.
        values: key of the recipe -> value.
        output: run directory, inside that of the grid and named after the labels.
    """

    labels: dict[str, str]
    values: dict[str, Any]
    output: Path

    @property
    def words(self) -> list[str]:
        """Overrides that make the grid's recipe this run's."""
        return [*(f"{key}={as_text(value)}" for key, value in self.values.items()),
                f"output={self.output}"]


def combinations(axes: Axes, output: str | Path) -> Iterator[Trial]:
    """Every combination of labels, the last axis varying fastest.

    Args:
        output: directory of the grid.
    """
    for labels in itertools.product(*axes.values()):
        named = dict(zip(axes, labels, strict=True))
        values: dict[str, Any] = {}
        for axis, label in named.items():
            values |= axes[axis][label]
        name = ",".join(map("=".join, named.items())).replace("/", "_")
        yield Trial(named, values, Path(output) / name)


def axis_of(key: str, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Label -> key -> value, for values of one key."""
    return {as_text(value): {key: value} for value in values}


def as_text(value: Any) -> str:
    """A value as an override writes it, which is YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
    return text.removesuffix("...").strip().strip("'")


def command(launch: str, script: str, recipe: str | Path, overrides: Sequence[str],
            trial: Trial) -> list[str]:
    """Command line of a run.

    Args:
        launch: command that starts a script; empty: this Python, one process.
        script: pretrain.py or finetune.py.
    """
    path = Path(__file__).resolve().parents[2] / script
    return [*shlex.split(launch or sys.executable), str(path), str(recipe), *overrides,
            *trial.words]


def run_all(commands: Mapping[Path, Sequence[str]], jobs: int | None = None) -> list[int]:
    """Runs command lines until one ends with bad input or on a signal.

    Args:
        commands: run directory -> command line.
        jobs: runs at a time, the output of each in a file beside its directory; None: one at a
            time, with this program's output.

    Returns:
        Exit codes, in the order in which runs end.
    """
    codes: list[int] = []
    threads = {"OMP_NUM_THREADS": "1"} if jobs and jobs > 1 else {}

    def run(output: Path, words: Sequence[str]) -> None:
        if ends_grid(codes):
            return
        print(f"$ {shlex.join(words)}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        log = output.with_suffix(".txt") if jobs else None
        with open_to_append(log) if log else nullcontext() as file:
            code = subprocess.run(words, stdout=file, stderr=file, check=False,
                                  env={**threads, **os.environ}).returncode
        if code:
            print(f"{output} ended with exit code {code}{f', see {log}' if log else ''}",
                  file=sys.stderr, flush=True)
        codes.append(code)

    with ThreadPoolExecutor(jobs or 1) as pool:
        list(pool.map(run, commands, commands.values()))
    return codes


def ends_grid(codes: Sequence[int]) -> int:
    """First exit code after which no other run is started, or 0."""
    ends = (exit_codes.BAD_INPUT, exit_codes.STOPPED_ON_SIGNAL)
    return next((code for code in codes if code in ends), exit_codes.FINISHED)
