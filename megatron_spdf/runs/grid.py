"""Grids of runs: every combination of the labels of some axes, each in a run directory of its own.

An axis has labels, and a label gives values to keys of the recipe. `optimizer.lr: [1e-4, 5e-5]` is
short for an axis of that name whose labels are the values.
"""

from __future__ import annotations

import itertools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spdf import exit_codes
from megatron_spdf.files import open_to_append, require_directory
from megatron_spdf.recipe.load import write_value
from megatron_spdf.recipe.words import overruled_by
from megatron_spdf.resilience.signals import SIGNALS
from megatron_spdf.section import parse_count

NAME_BYTES = 255 - len(".txt")  # of a file name on common file systems; logs stand beside
MOST_RUNS = 10_000
ASKED_TO_STOP = (signal.SIGINT, *SIGNALS)
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
        values = {**self.values, "output": str(self.output)}
        return [f"{key}={write_value(value)}" for key, value in values.items()]


def combinations(axes: Axes, output: str | Path) -> Iterator[Trial]:
    """Every combination of labels, the last axis varying fastest.

    Args:
        output: directory of the grid.

    Raises:
        ValueError: a label that names no directory, two combinations with one directory, two values
            for one key, or more combinations than anyone runs.
    """
    count = math.prod(map(len, axes.values()))
    if count > MOST_RUNS:
        raise ValueError(f"{count:,} combinations are over {MOST_RUNS:,}; try fewer values at once")
    seen: dict[Path, dict[str, str]] = {}
    for labels in itertools.product(*axes.values()):
        named = dict(zip(axes, labels, strict=True))
        values: dict[str, Any] = {}
        for axis, label in named.items():
            if both := values.keys() & axes[axis][label].keys():
                raise ValueError(f"{named} would give {min(both)} two values; let one axis have it")
            values |= axes[axis][label]
        refuse_control_characters([named, values])
        trial = Trial(named, values, Path(output) / directory_name(named))
        if trial.output in seen:
            raise ValueError(f"{seen[trial.output]} and {named} would both write to "
                             f"{trial.output}; give one of them another label")
        seen[trial.output] = named
        yield trial


def directory_name(labels: Mapping[str, str]) -> str:
    """Name of a run directory.

    Raises:
        ValueError: it would be too long.
    """
    name = ",".join(map("=".join, labels.items())).replace("/", "_")
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"the run {name[:60]!r}... would have a directory name of "
                         f"{len(name.encode())} bytes, and {NAME_BYTES} are possible; take shorter "
                         "values, or labels of your own in an experiment")
    return name


def refuse_control_characters(value: Any) -> None:
    """Raises ValueError where a text in a value has a character that cannot be printed, such as the
    end of a line."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"the value {value!r} has a character that cannot be printed; a value to "
                         "try is one line of printable text")
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            refuse_control_characters(part)


def axis_of(key: str, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Label -> key -> value, for values of one key.

    Raises:
        ValueError: a value is there twice.
    """
    spelled: dict[str, str] = {}
    for value in values:  # YAML takes `1e-4` for text, recipes for 0.0001
        label, number = write_value(value), write_value(parse_count(value))
        if spelled.setdefault(number, label) != label:
            raise ValueError(f"{key} has {number} twice, as {spelled[number]} and as {label}; "
                             "leave one of them out")
    return labeled(key, [(write_value(value), {key: value}) for value in values])


def labeled_axes(axes: Mapping[str, Any]) -> dict[str, Any]:
    """Axes of a file, each a list of values of the key that it is named after, or label -> what it
    stands for, with their labels as text. What is neither stays, for the schema to refuse.

    Raises:
        ValueError: a value or a label is there twice.
    """
    return {name: axis_of(name, axis) if isinstance(axis, list)
            else labeled(name, axis.items()) if isinstance(axis, dict) else axis
            for name, axis in axes.items()}


def labeled(axis: str, pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """What is given to the labels of an axis, by label as text.

    Raises:
        ValueError: two labels are the same text, or one is a truth value or nothing.
    """
    found: dict[str, Any] = {}
    for label, given in pairs:
        if isinstance(label, bool | None):
            raise ValueError(f"{axis} has the label {write_value(label)}, which is what YAML reads "
                             f"{'yes, no, on and off' if label is not None else 'nothing'} as; "
                             "write the label in quotes")
        if str(label) in found:
            raise ValueError(f"{axis} has {label} twice; leave one of them out, or give it another "
                             "label")
        found[str(label)] = given
    return found


def require_labels(key: str, labels: Mapping[str, str], axes: Axes) -> None:
    """Raises ValueError where a key of a grid names a label that no axis has."""
    for axis, label in labels.items():
        if axis not in axes:
            raise ValueError(f"{key} names {axis}={label}, and the axes are {', '.join(axes)}; "
                             "take one of them")
        if label not in axes[axis]:
            raise ValueError(f"{key} names {axis}={label}, and the labels of {axis} are "
                             f"{', '.join(axes[axis])}; take one of them")


def require_launch(launch: str) -> None:
    """Raises ValueError where no program of that name is here to start a script."""
    try:
        words = shlex.split(launch or sys.executable)
    except ValueError as error:
        raise ValueError(f"--launch {launch!r} is no command ({error}); quote it as for a "
                         "shell") from None
    if not words or not shutil.which(words[0]):
        raise ValueError(f"--launch {launch!r} begins with no program that is here; name one in "
                         "PATH or by its path, then its options, as --launch 'torchrun "
                         "--nproc-per-node 8'")


def command(launch: str, script: str, recipe: str | Path, overrides: Sequence[str],
            trial: Trial) -> list[str]:
    """Command line of a run.

    Args:
        launch: command that starts a script; empty: this Python, one process.
        script: pretrain.py or finetune.py.
        overrides: of every run, of which those of the trial are stronger.
    """
    path = Path(__file__).resolve().parents[2] / script
    return [*shlex.split(launch or sys.executable), str(path), str(recipe),
            *overruled_by(overrides, trial.words)]


def run_all(commands: Mapping[Path, Sequence[str]], jobs: int | None = None,
            chains: Iterable[Sequence[Path]] | None = None,
            prepare: Callable[[Path], bool] = lambda output: True,
            until: float = math.inf) -> list[int]:
    """Runs command lines until one ends with bad input or on a signal, one that knows nothing of
    exit codes included.

    Args:
        commands: run directory -> command line.
        jobs: runs at a time, the output of each in a file beside its directory; None: one at a
            time, with this program's output.
        chains: run directories, those of a chain to be run one after the other; None: each is free.
        prepare: called with a run directory before its command; False: it is not run.
        until: on the monotonic clock; what runs then is sent SIGTERM, at which our runs save and
            end, and nothing is begun. So are runs of a program that is sent a signal alone, as by
            `kill`.

    Returns:
        Exit codes, in the order in which runs end.

    Raises:
        ValueError: a run directory is one that cannot be made, before anything is begun.
    """
    for directory in dict.fromkeys(output.parent for output in commands):
        require_directory(directory)
    codes: list[int] = []
    stopped = threading.Event()
    threads = {"OMP_NUM_THREADS": "1"} if jobs and jobs > 1 else {}

    def over() -> bool:
        return stopped.is_set() or time.monotonic() >= until

    def run(output: Path, words: Sequence[str]) -> None:
        if ends_grid(codes) or not prepare(output):
            return
        if over():
            codes.append(exit_codes.STOPPED_ON_SIGNAL)
            return
        print(f"$ {shlex.join(words)}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        log = output.with_suffix(".txt") if jobs else None
        with open_to_append(log) if log else nullcontext() as file:
            code = _exit_code(words, over, stdout=file, stderr=file,
                              env={**threads, **os.environ})
        code = exit_codes.STOPPED_ON_SIGNAL if -code in ASKED_TO_STOP else code
        if code:
            print(f"{output} ended with exit code {code}{f', see {log}' if log else ''}",
                  file=sys.stderr, flush=True)
        codes.append(code)

    def run_chain(outputs: Sequence[Path]) -> None:
        for output in outputs:
            run(output, commands[output])

    with ThreadPoolExecutor(jobs or 1) as pool, _sets(stopped):
        left = {pool.submit(run_chain, chain) for chain in (
            [[output] for output in commands] if chains is None else chains)}
        while left:  # Python sleeps through a signal that comes just as it begins to wait
            done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for chain in done:
                chain.result()
    return codes


@contextmanager
def _sets(stopped: threading.Event) -> Iterator[None]:
    """Sets an event where this program is asked to stop, or interrupted."""
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in SIGNALS}
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(words: Sequence[str], over: Callable[[], bool], **options: Any) -> int:
    """Exit code of a command, which is sent SIGTERM when its time is over.

    Args:
        over: asked once a second.
        options: of `Popen`.
    """
    with subprocess.Popen(words, **options) as child:
        while not over():
            try:
                return child.wait(1.0)
            except subprocess.TimeoutExpired:
                continue
        child.terminate()
        return child.wait()


def ends_grid(codes: Sequence[int]) -> int:
    """First exit code after which no other run is started, or 0."""
    ends = (exit_codes.BAD_INPUT, exit_codes.STOPPED_ON_SIGNAL)
    return next((code for code in codes if code in ends), exit_codes.FINISHED)
