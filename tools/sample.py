#!/usr/bin/env python3
"""Continues a text with a model, token by token.

    python tools/sample.py runs/mine "import os"
    python tools/sample.py runs/mine "import os" --temperature 0.8 --top-p 0.95 --tokens 200
    python tools/sample.py runs/mine/checkpoints/step_00000500      # asks for texts, until Ctrl-D
    python tools/sample.py runs/exported < texts.txt                # goes on from each line

RUN is a run directory, of which the best checkpoint is taken or the newest, a checkpoint of a run,
of any layout and engine, or a Hugging Face directory. The model runs in this process, in fp32, as
its export would in transformers. Without --temperature, --top-k and --top-p the likeliest token is
taken each time.

A text is printed with what follows. A run that was fine-tuned on contexts and completions takes it
for a context, and says the completion alone. A text is over at the token that ends documents, after
--tokens, or where the model can read no further; --as text takes such a run for a model of texts,
and --as context an export of one for what it is.

Exit code 0, or 2 for what the user can put right.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_spdf import exit_codes
from megatron_spdf.command_line import (
    MOST,
    end_quietly,
    make_parser,
    number,
    positive,
    refusing,
    say,
)
from megatron_spdf.text import printable

COOLEST = 0.001  # temperature under which single precision divides logits to infinity
PROMPT = "> "
Continue = Callable[[str], None]


@refusing
def main(arguments: list[str] | None = None) -> int:
    """Run the tool."""
    options = parse_arguments(arguments)
    for stream in (sys.stdout, sys.stderr):  # whatever the locale can write
        stream.reconfigure(errors="backslashreplace")
    if options.text is not None:
        require_text(options.text)
    go_on = load(options)
    if options.text is not None:
        go_on(options.text)
        return exit_codes.FINISHED
    return converse(go_on) if sys.stdin.isatty() else go_on_from_lines(go_on)


def load(options: argparse.Namespace) -> Continue:
    """The model of RUN, as what prints a text and its continuation.

    Raises:
        ValueError: there is no whole model at RUN, it has no tokenizer, or there is no such device.
    """
    from megatron_spdf.checkpoint.store import run_of
    from megatron_spdf.convert.source import open_weights, tokenizer_of
    from megatron_spdf.resilience.world import find_ranks
    from megatron_spdf.runs.run_dir import task_of

    if find_ranks().world > 1:
        raise ValueError(f"tools/sample.py is one process, and {find_ranks().world} were started; "
                         "start it without a launcher, whatever the run's layout was")
    device = find_device(options.device)
    source = open_weights(options.run, checksums=False)
    tokenizer = tokenizer_of(source)
    run = run_of(options.run)
    context = options.kind == "context" or options.kind is None and bool(run and task_of(run))

    from megatron_spdf.convert.huggingface_export import in_memory
    from megatron_spdf.evaluation.sampling import (
        SamplingSettings,
        context_prompt,
        continue_text,
        text_prompt,
    )

    settings = SamplingSettings(options.tokens, options.temperature, options.top_k, options.top_p)
    how = "greedy" if settings.greedy else f"--seed {seed_draws(options.seed)}"
    say(f"{source.origin}, {'a completion' if context else 'text'} on {device}, {how}", sys.stderr)
    model = in_memory(source).to(device)

    def go_on(text: str) -> None:
        require_text(text)
        printer = Printer(skip_blanks=context)
        if not context:
            printer.write(text)
        prompt = (context_prompt if context else text_prompt)(tokenizer, text)
        ending = continue_text(model, tokenizer, prompt, settings, printer.write)
        printer.end()
        if ending == "window":
            say(f"(the model reads no more than {model.config.max_position_embeddings:,} tokens)",
                sys.stderr)
    return go_on


class Printer:
    """Prints pieces of text as they come.

    A terminal gets escapes for the characters that it would obey, anything else the text itself.

    Args:
        skip_blanks: leave out those that the text begins with.
    """

    def __init__(self, skip_blanks: bool = False):
        self._skip, self._escape = skip_blanks, sys.stdout.isatty()

    def write(self, piece: str) -> None:
        """Prints a piece at once."""
        if self._skip:
            piece = piece.lstrip()
            self._skip = not piece
        if self._escape:
            piece = "".join(c if c in "\n\t" else printable(c) for c in piece)
        print(piece, end="", flush=True)

    def end(self) -> None:
        """Ends the text's last line."""
        print(flush=True)


def converse(go_on: Continue) -> int:
    """Goes on from each line that is typed. Ctrl-C ends a text, and Ctrl-D the conversation."""
    try:
        import readline  # noqa: F401  editing and history for input()
    except ImportError:
        pass
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say("Type a text to go on from; Ctrl-C ends a text, Ctrl-D ends all.", sys.stderr)
    while True:
        try:
            answer(go_on, input(PROMPT))
        except EOFError:
            print()
            return exit_codes.FINISHED
        except KeyboardInterrupt:
            print()


def go_on_from_lines(go_on: Continue) -> int:
    """Goes on from each line of standard input; a line that cannot be gone on from is said."""
    answered = [answer(go_on, line) for line in lines_in()]
    return exit_codes.FINISHED if all(answered) else exit_codes.BAD_INPUT


def lines_in() -> Iterator[str]:
    """The lines of standard input, which end as `text.lines_of` says. Bytes that are not UTF-8 are
    as in arguments, for `require_text`."""
    for line in sys.stdin.buffer:
        yield line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="surrogateescape")


def require_text(text: str) -> None:
    """Raises a ValueError where a text has what is no character, such as a byte of an argument that
    is not UTF-8: a tokenizer would take another text for it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        beginning = printable(text[:error.end][-40:])
        raise ValueError(f"the text is not UTF-8 where it says {beginning}; convert it") from None


def answer(go_on: Continue, text: str) -> bool:
    """Goes on from a text, or says why it cannot; returns whether it did."""
    try:
        go_on(text)
    except ValueError as error:
        say(f"error: {error}", sys.stderr)
        return False
    return True


def find_device(name: str | None) -> str:
    """The device of that name, or the GPU where there is one.

    Raises:
        ValueError: there is no GPU.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, and no GPU can be used here; leave out --device, or see "
                         "tools/doctor.py")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def seed_draws(seed: int | None) -> int:
    """Seeds PyTorch's generator, by a number of its own where none is given; returns it."""
    import torch

    seed = random.SystemRandom().randrange(MOST) if seed is None else seed
    torch.manual_seed(seed)
    return seed


def temperature(text: str) -> float:
    """A temperature; the type of an argument."""
    try:
        return number(float, least=COOLEST, most=MOST)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; leave out --temperature, --top-k and --top-p "
                                         "for the likeliest token each time") from None


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN",
        help="run directory, checkpoint, or Hugging Face directory")
    add("text", nargs="?", metavar="TEXT",
        help="to go on from, empty for a new document (default: each line that is typed, or of "
             "standard input)")
    add("--tokens", type=positive, default=128, metavar="N", help="most that are added (default: "
        "128)")
    add("--temperature", type=temperature, metavar="T",
        help="divides the logits: under 1 bolder, over 1 more random; leave it out for greedy text")
    add("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=number(float, above=0.0, most=1.0), metavar="P",
        help="draw from the likeliest tokens that together have the probability P")
    add("--seed", type=number(int, least=0, most=2**63 - 1), metavar="N",
        help="of the draws (default: another each time, which is said)")
    add("--as", dest="kind", choices=("text", "context"),
        help="what TEXT is (default: context for a fine-tuning run, text for all else)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    options = parser.parse_intermixed_args(arguments)
    if options.seed is not None and {options.temperature, options.top_k, options.top_p} == {None}:
        parser.error("--seed is of draws, and greedy text has none; give --temperature, --top-k or "
                     "--top-p, or leave out --seed")
    return options


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
