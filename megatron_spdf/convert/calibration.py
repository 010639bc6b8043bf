"""Text that weights are selected by, and text on which perplexity is measured before and after.

Both are sequences at even distances of indexed data sets, as `data.pretraining.samples.Windows`
cuts them. Checked without a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_spdf.data.indexed.manifest import check_prefix, is_foreign
from megatron_spdf.data.indexed.tokens import look_at_ids
from megatron_spdf.data.tokenizers.tokenizer import Tokenizer
from megatron_spdf.recipe.recipe import Recipe

SAMPLES = 128  # sequences, of Wanda's and SparseGPT's codes
HELD_OUT = 10  # one of so many sequences at the end of a data set, where no other is given


@dataclass(frozen=True)
class Calibration:
    """What a user asks for.

    Attributes:
        calibrate: prefix of the data set that weights are selected by; None: none.
        evaluate: prefix of the data set of the perplexity; None: the end of the other, which is
            held out.
        samples: sequences to select by, and the most that perplexity is measured on.
        length: tokens of a sequence; None: `train.sequence_length`.
    """

    calibrate: str | None = None
    evaluate: str | None = None
    samples: int = SAMPLES
    length: int | None = None


@dataclass(frozen=True)
class Sequences:
    """Sequences of a checked data set: `starts` are their first tokens, `length` tokens and one
    more label each."""

    prefix: str
    starts: np.ndarray
    length: int

    def __str__(self) -> str:
        return f"{len(self.starts):,} sequences of {self.length:,} tokens of {self.prefix}"


@dataclass(frozen=True)
class CheckedText:
    """Text to select weights by, where there is any, and to measure perplexity on."""

    calibrate: Sequences | None
    evaluate: Sequences
    tokenizer: Tokenizer

    @property
    def said(self) -> str:
        """Record of the calibration for run.json, without the name of a directory."""
        seen = self.calibrate
        return "" if seen is None else (f", with {len(seen.starts):,} sequences of "
                                        f"{seen.length:,} tokens of {Path(seen.prefix).name}")


def check_text(asked: Calibration, recipe: Recipe, tokenizer: Tokenizer) -> CheckedText | None:
    """Checks the data sets that a user names, and chooses their sequences.

    Returns:
        None where no data set is named.

    Raises:
        ValueError: a data set is not whole, of another tokenizer, or has too few tokens; the
            sequences are longer than the model reads.
    """
    if not (asked.calibrate or asked.evaluate):
        return None
    length = asked.length or recipe.train.sequence_length
    if length > recipe.model.max_positions:
        raise ValueError(f"--sequence-length={length:,} is more than model.max_positions="
                         f"{recipe.model.max_positions:,}, the tokens that the model reads at once")
    windows = {prefix: _windows(prefix, length, recipe, tokenizer)
               for prefix in filter(None, (asked.calibrate, asked.evaluate))}
    held_out = 0
    if not asked.evaluate:
        held_out = max(1, windows[asked.calibrate] // HELD_OUT)
    calibrate = None
    if asked.calibrate:
        free = windows[asked.calibrate] - held_out
        _require(asked, windows[asked.calibrate], free, length)
        calibrate = _spread(asked.calibrate, 0, free, asked.samples, length)
    prefix = asked.evaluate or asked.calibrate
    first = windows[prefix] - held_out if held_out else 0
    return CheckedText(calibrate, _spread(prefix, first, windows[prefix] - first, asked.samples,
                                          length), tokenizer)


def _windows(prefix: str, length: int, recipe: Recipe, tokenizer: Tokenizer) -> int:
    """The number of sequences that a data set has, once it is checked."""
    tokens = check_prefix(prefix, tokenizer.sha256).tokens
    if is_foreign(prefix):
        look_at_ids(prefix, tokenizer.vocab_size)
    if tokens <= length:
        raise ValueError(f"{prefix} holds {tokens:,} tokens, which is not one sequence of "
                         f"{length:,} and its label; use more text or a shorter --sequence-length")
    return (tokens - 1) // length


def _require(asked: Calibration, windows: int, free: int, length: int) -> None:
    """Requires that a data set has as many sequences as are asked for."""
    if free < asked.samples:
        but, other = "", ""
        if free < windows:
            but = f", the last {windows - free:,} of them held out for the perplexity"
            other = ", or other text to --evaluate"
        raise ValueError(f"{asked.calibrate} holds {windows:,} sequences of {length:,} tokens"
                         f"{but}, and --calibration-samples={asked.samples:,} are more than the "
                         f"{free:,} there are; give fewer, a shorter --sequence-length or more "
                         f"text{other}")


def _spread(prefix: str, first: int, available: int, count: int, length: int) -> Sequences:
    """At most `count` sequences at even distances, of those that are available from one on."""
    count = min(count, available)
    chosen = first + np.arange(count) * available // count
    return Sequences(prefix, chosen * length, length)
