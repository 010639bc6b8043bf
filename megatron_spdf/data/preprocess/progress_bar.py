"""How far preprocessing is, and how fast it goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_spdf.data.indexed.manifest import Counts


class Bar:
    """Progress by bytes of the input files, which are known beforehand, with the speed in text and
    tokens.

    Args:
        paths: of all inputs.
        done: how many of them an earlier run has finished.
        show: on stderr; None shows it on a terminal only.
    """

    def __init__(self, paths: Sequence[Path], done: int, show: bool | None):
        sizes = [path.stat().st_size for path in paths]
        disable = None if show is None else not show
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(total=sum(sizes), initial=sum(sizes[:done]), unit="B", unit_scale=True,
                         desc="input", disable=disable, mininterval=interval)
        self._start_of_input = self._bar.n
        self._text_bytes = self._documents = self._tokens = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self._show_speed()
        self._bar.close()

    def advance(self, bytes_read: int, new: Counts) -> None:
        """Goes to `bytes_read` bytes of the input in hand, with `new` documents."""
        self._text_bytes += new.text_bytes
        self._documents += new.documents
        self._tokens += new.tokens
        if self._bar.update(self._start_of_input + bytes_read - self._bar.n):
            self._show_speed()

    def end_input(self, bytes_read: int) -> None:
        """The input in hand is at its end; `bytes_read` is its size."""
        self._start_of_input += bytes_read
        self._bar.update(self._start_of_input - self._bar.n)

    def _show_speed(self) -> None:
        if self._bar.disable:
            return
        seconds = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(
            f"text {self._text_bytes / 1e6 / seconds:.1f} MB/s, "
            f"{self._documents / seconds:,.0f} documents/s, {self._tokens:,} tokens"
        )
