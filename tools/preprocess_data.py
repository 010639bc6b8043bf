"""Tokenize text shards to an indexed dataset for pre-training.

python tools/preprocess_data.py --input 'shards/*.jsonl.zst' --output data/train --tokenizer
data/gpt2 python tools/preprocess_data.py --input 'pile/*.jsonl.zst' --output data/pile --tokenizer
data/gpt2 --split 98,1,1

Interrupted, the same command goes on after the last input that was finished.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import megatron_spdf  # noqa: F401  before what takes time to import, for interrupts meanwhile

# isort: split
from pydantic import ByteSize, Field, TypeAdapter, ValidationError

from megatron_spdf.command_line import hear_interrupts, make_parser, path_text, positive, say
from megatron_spdf.data.indexed.manifest import CorpusManifest
from megatron_spdf.data.preprocess.documents import FORMATS, expand_inputs, sample_texts
from megatron_spdf.data.preprocess.encode import SPLITS, split_bounds
from megatron_spdf.data.preprocess.preprocess import Manifest, preprocess, usual_workers
from megatron_spdf.data.preprocess.records import MAX_RECORD_BYTES, ON_ERROR
from megatron_spdf.data.preprocess.staging import Partial
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from megatron_spdf.text import sentence_of


def parse_bytes(size: str) -> int:
    """Bytes of a size in words: "100MB" is 100,000,000, "1GiB" is 2**30."""
    try:
        return TypeAdapter(Annotated[ByteSize, Field(gt=0)]).validate_python(size)
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{size!r} is not a size; write for example 100MB or 1GiB"
        ) from None


def parse_shares(shares: str) -> tuple[float, ...]:
    """Shares of train, valid and test: "98,1,1"."""
    try:
        numbers = tuple(float(share) for share in shares.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shares!r:.60} is not two or three numbers with commas "
                                         "between; write for example 98,1,1") from None
    try:
        split_bounds(numbers)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return numbers


def parse_workers(count: str) -> int:
    if not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{count!r} is not a number of workers; write 1 or more")
    return int(count)


OPTIONS = {
    "--input": dict(nargs="+", required=True, type=path_text,
                    help=f"files or quoted patterns, of {', '.join(FORMATS)}"),
    "--output": dict(
        required=True, type=path_text, metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .json and .tokenizer; with --split, --by-set or --per-shard "
             "a directory PREFIX of such data sets",
    ),
    "--tokenizer": dict(
        required=True, type=Path, metavar="PATH",
        help="directory of GPT-2 BPE files, a tokenizer.json, or a SentencePiece *.model",
    ),
    "--end-of-document": dict(
        metavar="TOKEN",
        help="token of the tokenizer that ends documents (default: <|endoftext|>, </s> or what the "
             "tokenizer says)",
    ),
    "--train-tokenizer": dict(
        choices=("bpe", "sentencepiece"),
        help="train a tokenizer on the input and write it to the directory --tokenizer, which must "
             "not exist",
    ),
    "--vocab-size": dict(type=positive, metavar="N",
                         help="exact number of ids of the trained tokenizer"),
    "--train-bytes": dict(
        type=parse_bytes, default="100MB", metavar="SIZE",
        help="text to train on, an even share from the start of every file (default: 100MB)",
    ),
    "--workers": dict(
        type=parse_workers, metavar="N",
        help="processes that tokenize (default: one for each core, for small input fewer); the "
             "result is the same",
    ),
    "--text-key": dict(default="text", metavar="KEY",
                       help="key of the text in a record (default: text)"),
    "--on-error": dict(
        choices=ON_ERROR, default="stop",
        help="at a record that cannot be read: stop (default), or skip it and list it in the "
             "manifest",
    ),
    "--max-document": dict(
        type=parse_bytes, default=MAX_RECORD_BYTES, metavar="SIZE",
        help="a longer record cannot be read (default: 100MB); it takes some ten times its size in "
             "memory",
    ),
    "--split": dict(
        type=parse_shares, metavar="A,B[,C]",
        help=f"shares of {', '.join(SPLITS)}, by a hash of the text: writes PREFIX/train and so "
             "on; a document's place does not change when files are added",
    ),
    "--by-set": dict(
        nargs="?", const="pile_set_name", metavar="KEY",
        help="a data set for each value of this key of meta (default: pile_set_name)",
    ),
    "--per-shard": dict(action="store_true", help="a data set for each input file"),
    "--deduplicate": dict(action="store_true",
                          help="of documents with the same text keep the first (16 bytes of "
                          "memory a document)"),
    "--ftfy": dict(action="store_true",
                   help="mend the texts with ftfy first (broken encodings, odd characters)"),
    "--no-eod": dict(action="store_true", help="no end-of-document token after each document"),
    "--overwrite": dict(action="store_true", help="replace PREFIX if it exists"),
    "--progress": dict(action="store_true",
                       help="show progress even where stderr is not a terminal"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; exit code 0, or 2 for what the user can put right, with one line saying how."""
    options = _parse(arguments)
    # so that clean-up runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    partial = Partial(options.output, bool(options.split or options.by_set or options.per_shard))
    started = 0.0

    def make_tokenizer() -> Tokenizer:
        nonlocal started
        tokenizer = obtain_tokenizer(options, partial)
        started = time.perf_counter()
        return tokenizer

    try:
        if not partial.ready:
            partial.require_free(options.overwrite)
        manifest = preprocess(
            options.input,
            options.output,
            make_tokenizer,
            workers=options.workers or usual_workers(expand_inputs(options.input)),
            overwrite=options.overwrite,
            progress=options.progress or None,
            text_key=options.text_key,
            on_error=options.on_error,
            append_eod=not options.no_eod,
            max_document_bytes=options.max_document,
            ftfy=options.ftfy,
            deduplicate=options.deduplicate,
            split=options.split,
            set_key=options.by_set,
            per_shard=options.per_shard,
        )
    except (ValueError, OSError, RuntimeError) as error:
        say(f"error: {sentence_of(error)}{describe_kept(partial)}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; no data set was written{describe_kept(partial)}", sys.stderr)
        return 128 + signal.SIGINT
    say(summarize(options.output, manifest, time.perf_counter() - started))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if bool(options.train_tokenizer) != bool(options.vocab_size):
        parser.error("--train-tokenizer and --vocab-size go together")
    if options.train_tokenizer and options.end_of_document is not None:
        parser.error("--end-of-document names a token of a tokenizer that is there; one that is "
                     "trained gets <|endoftext|> or </s>")
    return options


def _make_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    return parser


def obtain_tokenizer(options: argparse.Namespace, partial: Partial) -> Tokenizer:
    """Load the tokenizer, or train it on the first texts of all inputs."""
    interrupted = partial.finished_inputs or partial.ready
    if not options.train_tokenizer or (interrupted and options.tokenizer.exists()):
        return load_tokenizer(options.tokenizer, options.end_of_document)
    if options.tokenizer.exists():
        raise ValueError(f"{options.tokenizer} exists; use it without --train-tokenizer, or give a "
                         "new path")
    paths = expand_inputs(options.input)
    texts = sample_texts(paths, options.train_bytes, options.text_key, options.on_error)
    return train_tokenizer(options.train_tokenizer, texts, options.vocab_size, options.tokenizer)


def describe_kept(partial: Partial) -> str:
    """What an interrupted run leaves behind for the next."""
    count = partial.finished_inputs
    return (
        f"\n{partial.directory} keeps {count} finished inputs; the same command goes on from there"
        if count
        else ""
    )


def empty_splits(manifest: CorpusManifest) -> list[str]:
    """Splits that have a share and got no document."""
    shares = zip(SPLITS, manifest.settings.split or (), strict=False)
    there = {name.partition("/")[0] for name in manifest.data_sets}
    return [name for name, share in shares if share and name not in there]


def summarize(prefix: str, manifest: Manifest | CorpusManifest, seconds: float) -> str:
    """What was written, how fast, and what was left out; a line more for each of several data
    sets."""
    megabytes = manifest.text_bytes / 1e6
    lines = [
        f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{megabytes:,.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s), "
        f"{manifest.skipped:,} skipped, {manifest.empty:,} empty"
    ]
    if manifest.settings.deduplicate:
        lines[0] += f", {manifest.duplicates:,} duplicates"
    if isinstance(manifest, CorpusManifest):
        lines += [f"  {name}: {counts.documents:,} documents, {counts.tokens:,} tokens"
                  for name, counts in manifest.data_sets.items()]
        lines += [f"  {name}: no document, so that there is no such data set; give it a larger "
                  "share, or more text" for name in empty_splits(manifest)]
    return "\n".join(lines)


if __name__ == "__main__":
    hear_interrupts()
    sys.exit(main())
