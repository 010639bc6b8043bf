#!/usr/bin/env python3
"""Sparse pre-training, dense fine-tuning, end to end on this machine's CPU, without a download:
`make demo`.

The sources of the running Python's standard library become Pile-format shards, and a tokenizer is
trained on them. The same small GPT is pre-trained dense, with 75% of its linear weights at zero,
and with masks that move (SET), each on two tensor-parallel ranks. All three are fine-tuned with
DeepSpeed on a synthetic table-to-text set, dense, and the second with its mask kept too, and
scored. It ends with a table of each mode, text before and after fine-tuning, a plot and a report
page.

    python tools/demo.py [--output runs/demo] [section.key=value ...]

Interrupted, the same command goes on. A demo that has ended begins anew.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks would need two GPUs
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))

from demo_parts.parts import LOGS, Demo  # noqa: E402
from demo_parts.progress import Part, Progress  # noqa: E402
from demo_parts.work import Failed, import_engines  # noqa: E402

from megatron_spdf import exit_codes  # noqa: E402
from megatron_spdf.command_line import hear_interrupts, make_parser, refusing, say  # noqa: E402
from megatron_spdf.files import require_directory, write_file  # noqa: E402
from megatron_spdf.locks import locked  # noqa: E402
from megatron_spdf.recipe.words import add_overrides  # noqa: E402

VERSION, LOCK, DONE, TABLES = "demo.version", "demo.lock", "done", "tables.txt"
LAST_LINES = 15  # of a log, shown on failure


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"),
                        help="everything goes there")
    add_overrides(parser, "changes to the pre-training recipe")
    options = parser.parse_intermixed_args(arguments)
    demo = Demo(options.output, options.overrides)
    require_directory(demo.output, "--output")
    demo.output.mkdir(parents=True, exist_ok=True)
    with locked(demo.output / LOCK, wait=False) as mine:
        if not mine:
            raise ValueError(f"another demo is at work in {demo.output}; wait for it, or give "
                             "another --output")
        going_on = make_room(demo)
        try:
            perform(demo, going_on)
        except Failed as failed:
            return explain(failed)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here", sys.stderr)
            return exit_codes.STOPPED_ON_SIGNAL
    return exit_codes.FINISHED


def make_room(demo: Demo) -> bool:
    """Empties the directory of a demo that has ended or is made otherwise; whether there is one
    that was interrupted.

    Raises:
        ValueError: the directory is no demo's.
    """
    version = demo.output / VERSION
    others = [path for path in demo.output.iterdir() if path.name != LOCK]
    if others and not version.is_file():
        raise ValueError(f"{demo.output} has files that are not of this demo, such as "
                         f"{sorted(others)[0].name}; remove it, or give another --output")
    if others and version.read_text() == demo.version and not (demo.output / TABLES).exists():
        return True
    for path in others:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_file(version, demo.version)
    return False


def perform(demo: Demo, going_on: bool) -> None:
    """Does all parts, and prints what comes of them.

    Raises:
        Failed: one failed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    stages = [demo.data()], demo.pretraining(), demo.fine_tuning(), demo.page()
    data, pretraining, tuning, page = stages
    print(introduction(*stages))
    print(f"Everything goes to {demo.output}, whole logs to {demo.output / LOGS}.")
    print("An interrupted demo goes on.\n" if going_on else "", flush=True)
    seconds = {part.name: part.seconds for stage in stages for part in stage}
    progress = Progress(sum(seconds.values()), demo.output / DONE, max(map(len, seconds)))
    try:
        progress.perform(data, meanwhile=import_engines)
        progress.perform(pretraining)
        progress.say(f"\n{demo.pretraining_table()}\n")
        progress.perform(tuning, at_once=2)
        progress.perform(page, at_once=2)
    finally:
        progress.close()
    end(demo, time.monotonic() - started)


def introduction(data: list[Part], pretraining: list[Part], tuning: list[Part],
                 page: list[Part]) -> str:
    """What is about to be done, and how long it takes."""
    rows = {"data: a corpus, its tokenizer, and a table-to-text set": seconds_of(data),
            f"pre-training of {len(pretraining)} small GPTs, each on two tensor-parallel ranks; "
            "the first table": seconds_of(pretraining),
            f"fine-tuning, {len(tuning)} runs, two at a time; the second table":
                seconds_of(tuning) / 2,
            "text before and after, a plot and a report page": seconds_of(page) / 2}
    rows["in all"] = sum(rows.values())
    return "\n".join([
        "Sparse pre-training, dense fine-tuning, on this machine's CPU. On two quiet cores:",
        *(f"{seconds:5.0f} s  {what}" for what, seconds in rows.items())])


def seconds_of(parts: list[Part]) -> float:
    return sum(part.seconds for part in parts)


def end(demo: Demo, seconds: float) -> None:
    """Prints the tables, the samples and where the files are."""
    tables = f"{demo.pretraining_table()}\n\n{demo.fine_tuning_table()}"
    columns = min(100, shutil.get_terminal_size().columns)
    print(f"\n{demo.fine_tuning_table()}\n\n{demo.texts(columns)}\n\n"
          f"tables   {demo.output / TABLES}\nplot     {demo.plot}\npage     {demo.report}\n"
          f"more     python tools/sample.py {demo.runs['dense']} \"import os\"\n"
          f"done in {seconds:.0f} s, {cpu_seconds():.0f} s of CPU", flush=True)
    write_file(demo.output / TABLES, tables + "\n")


def cpu_seconds() -> float:
    """CPU seconds of this process and those it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def explain(failed: Failed) -> int:
    """Says what failed, with the end of its log; returns an exit code."""
    log = failed.work.log
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    say("\n".join([f"failed with exit code {failed.code}: {failed.work.line}", *lines,
                   f"(the end of {log}; the same command goes on from here)"]), sys.stderr)
    return failed.code if failed.code > 0 else 1


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
