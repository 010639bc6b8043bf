"""Parts of a command line that tools share."""

from __future__ import annotations

import argparse
import codecs
import functools
import locale
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from megatron_spdf import exit_codes
from megatron_spdf.files import open_standard_streams, require_writable
from megatron_spdf.paths import expand_home
from megatron_spdf.text import printable_lines, sentence_of

open_standard_streams()  # before any other file
# Pictures become files: what a notebook or a desktop shows them with may be missing here.
os.environ["MPLBACKEND"] = "agg"


def start_again_in_utf8() -> None:
    """Starts this program again in Python's UTF-8 mode where the locale has another encoding, such
    as de_DE.ISO-8859-1: paths, texts and arguments are UTF-8 here, whatever the terminal's are."""
    if sys.flags.utf8_mode or codecs.lookup(locale.getencoding()).name == "utf-8":
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]],
              {**os.environ, "PYTHONUTF8": "1"})  # of processes that it starts


class _Given(argparse.Action):
    """Stores the value of an option. Given again, a list of values goes on, and a single value is
    refused: which of the two was meant, nobody knows."""

    _namespace: argparse.Namespace | None = None  # in which it is stored already

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if option_string and self._namespace is namespace:
            if not isinstance(values, list):
                parser.error(f"{option_string} is given twice; give it once")
            values = [*getattr(namespace, self.dest), *values]
        self._namespace = namespace
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """A parser of whose options none is overruled by another of its name, and that reads `~` in
    paths (`type=Path`, or `type=path_text` for those that must stay text)."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register("action", None, _Given)
        self.register("action", "store", _Given)
        self.register("type", Path, lambda text: Path(path_text(text)))


def path_text(text: str) -> str:
    """A path as a user writes it; the type of an argument."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_file(text: str) -> Path:
    """A file to be written, which is judged before anything is computed; the type of an argument.
    """
    path = Path(path_text(text))
    try:
        require_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def output_picture(text: str) -> Path:
    """An `output_file` whose name ends in a format of pictures, or in none."""
    from matplotlib.backend_bases import FigureCanvasBase

    path, known = output_file(text), FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in ("", *known):
        raise argparse.ArgumentTypeError(f"{text} ends in no format of pictures; those are "
                                         f"{', '.join(sorted(known))}")
    return path


def make_parser(text: str | None, **settings) -> argparse.ArgumentParser:
    """A parser of a program's words, whose help shows a text as it is written, and that takes
    options in full only."""
    start_again_in_utf8()
    return _Parser(description=text, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter, **settings)


def number(kind: type[int] | type[float], least: float | None = None, most: float | None = None,
           above: float | None = None, below: float | None = None) -> Callable[[str], int | float]:
    """Type of an argument that is a finite number.

    Args:
        kind: int or float.
        least, most: bounds that it may have; None: none.
        above, below: bounds that it may not have.
    """
    bounds = {"at least": least, "over": above, "at most": most, "under": below}
    rules = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
    rule = ", ".join([f"must be a {'whole' if kind is int else 'finite'} number", *rules])

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r:.60} {rule}") from None
        if (not math.isfinite(value) or least is not None and value < least
                or most is not None and value > most or above is not None and value <= above
                or below is not None and value >= below):
            raise argparse.ArgumentTypeError(f"{text!r:.60} {rule}")
        return value
    return parse


# Most that any cluster, data set or patience has.
MOST = 10**6
positive = number(int, least=1, most=MOST)
positive_real = number(float, above=0.0)


def refusing(main: Callable[..., int]) -> Callable[..., int]:
    """The function, which says an error that a user can put right and returns the exit code for
    it."""
    @functools.wraps(main)
    def run(*arguments) -> int:
        try:
            return main(*arguments)
        except (ValueError, OSError) as error:
            say(f"error: {sentence_of(error)}", sys.stderr)
            return exit_codes.BAD_INPUT
    return run


def print_words(words: Iterable[str]) -> None:
    """Prints words for a script, a NUL before them all and after each, so that a path may have
    every character and nothing that a library prints is taken for a word."""
    print("", *words, "", sep="\0", end="", flush=True)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a text, of which strangers may have written parts.

    Args:
        file: default: standard output.
    """
    print(printable_lines(text), file=file or sys.stdout, flush=True)


def end_quietly() -> None:
    """Lets an interrupt, or a pipe that is closed as by `head`, end the program without a
    traceback."""
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def hear_interrupts() -> None:
    """Makes an interrupt a KeyboardInterrupt, so that what is under way is put in order, and no
    traceback of one that nobody catches: Python ends with the signal, which a shell takes for
    status 130. What was started with interrupts ignored goes on ignoring them."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def say_all_else(kind, error, trace, say=sys.excepthook) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            say(kind, error, trace)

    sys.excepthook = say_all_else
