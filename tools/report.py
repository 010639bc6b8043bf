#!/usr/bin/env python3
"""One page about any runs, finished or not: curves, speed, memory, sparsity, SPDF's table beside
the paper's, a comparison of any two runs, moves of masks, and samples of text.

    python tools/report.py runs/dense runs/s75 -o report.html

The page is one file: plots and script are inline, nothing is loaded. Exit code 0, or 2 with a
sentence on what to change.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_spdf.command_line import end_quietly, make_parser, output_file, refusing, say
from megatron_spdf.files import write_file
from megatron_spdf.reports.runs import read_begun
from megatron_spdf.reports.runs_page import render_report
from megatron_spdf.text import counted


@refusing
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="directories of pre-training or fine-tuning")
    parser.add_argument("-o", "--output", type=output_file, default="report.html", metavar="FILE",
                        help="the page, replaced if it exists (default: report.html)")
    parser.add_argument("--title", default="Sparse pre-training, dense fine-tuning: runs",
                        help="of the page")
    options = parser.parse_args(arguments)
    runs, left_out = read_begun(options.runs)
    for sentence in left_out:
        say(sentence, sys.stderr)
    write_file(options.output, render_report(runs, options.output, options.title, left_out))
    say(f"{options.output}: {counted(len(runs), 'run')}, "
        f"{options.output.stat().st_size / 1024:,.0f} KiB")
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
