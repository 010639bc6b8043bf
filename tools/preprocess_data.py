"""Tokenize text shards to an indexed dataset for pre-training.

python tools/preprocess_data.py --input 'shards/*.jsonl.zst' --output data/train --tokenizer data/gpt2
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import _path  # noqa: F401  puts the repository root on sys.path
from pydantic import ByteSize, TypeAdapter, ValidationError

from megatron_spdf.data.documents import FORMATS, ON_ERROR, expand_inputs, sample_texts
from megatron_spdf.data.preprocess import Manifest, preprocess, require_free
from megatron_spdf.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


def parse_bytes(size: str) -> int:
    """Bytes of a size in words: "100MB" is 100,000,000, "1GiB" is 2**30."""
    try:
        return TypeAdapter(ByteSize).validate_python(size)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{size!r} is not a size; write for example 100MB or 1GiB") from None


OPTIONS = {
    "--input": dict(nargs="+", required=True, help=f"files or quoted patterns, of {', '.join(FORMATS)}"),
    "--output": dict(required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json and .tokenizer"),
    "--tokenizer": dict(
        required=True, type=Path, metavar="PATH",
        help="directory of GPT-2 BPE files, a tokenizer.json, or a SentencePiece *.model",
    ),
    "--train-tokenizer": dict(
        choices=("bpe", "sentencepiece"),
        help="train a tokenizer on the input and write it to the directory --tokenizer, which must not exist",
    ),
    "--vocab-size": dict(type=int, metavar="N", help="exact number of ids of the trained tokenizer"),
    "--train-bytes": dict(
        type=parse_bytes, default="100MB", metavar="SIZE",
        help="text to train on, an even share from the start of every file (default: 100MB)",
    ),
    "--text-key": dict(default="text", metavar="KEY", help="key of the text in a record (default: text)"),
    "--on-error": dict(
        choices=ON_ERROR, default="stop",
        help="at a record that cannot be read: stop (default), or skip it and list it in PREFIX.json",
    ),
    "--no-eod": dict(action="store_true", help="no end-of-document token after each document"),
    "--overwrite": dict(action="store_true", help="replace PREFIX if it exists"),
    "--progress": dict(action="store_true", help="show progress even where stderr is not a terminal"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; exit code 0, or 2 for what the user can put right, with one line saying how."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if bool(options.train_tokenizer) != bool(options.vocab_size):
        parser.error("--train-tokenizer and --vocab-size go together")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    try:
        require_free(options.output, options.overwrite)
        tokenizer = obtain_tokenizer(options)
        manifest = preprocess(
            options.input,
            options.output,
            tokenizer,
            text_key=options.text_key,
            on_error=options.on_error,
            append_eod=not options.no_eod,
            overwrite=options.overwrite,
            progress=options.progress or None,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no data set was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(summarize(options.output, manifest))
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    return parser


def obtain_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer, or train it on the first texts of all inputs."""
    if not options.train_tokenizer:
        return load_tokenizer(options.tokenizer)
    if options.tokenizer.exists():
        raise ValueError(f"{options.tokenizer} exists; use it without --train-tokenizer, or give a new path")
    paths = expand_inputs(options.input)
    texts = sample_texts(paths, options.train_bytes, options.text_key, options.on_error)
    return train_tokenizer(options.train_tokenizer, texts, options.vocab_size, options.tokenizer)


def summarize(prefix: str, manifest: Manifest) -> str:
    """One line: what was written, how fast, and what was left out."""
    megabytes = manifest.text_bytes / 1e6
    return (
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{megabytes:,.1f} MB of text in {manifest.seconds:.1f} s ({megabytes / manifest.seconds:.1f} MB/s), "
        f"{manifest.skipped:,} skipped, {manifest.empty:,} empty"
    )


if __name__ == "__main__":
    sys.exit(main())
