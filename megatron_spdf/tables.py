"""Tables for the terminal, Markdown and HTML, drawn by `tabulate` from one description.

    table = Table([Column("layer"), Column("memory", "bytes", ".2f", GIB)], rows)
    print(table.text())
"""

from __future__ import annotations

import csv
import html
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from megatron_spdf.records.values import read_bytes
from megatron_spdf.text import lines_of, printable

MOST_CSV_BYTES = 2**26
# `tabulate`'s "simple" makes columns two wider than their heads.
_ROW = DataRow("", "  ", "")
_TERMINAL = TableFormat(None, Line("", "-", "  ", ""), None, None, _ROW, _ROW, 0, None)


@dataclass(frozen=True)
class Unit:
    """Unit of a column, named in its head.

    Attributes:
        size: of one unit, in what the rows count; values are divided by it.
    """

    name: str
    size: float


GIB, MIB = Unit("GiB", 2**30), Unit("MiB", 2**20)
SECONDS, MILLISECONDS, MICROSECONDS = Unit("s", 1.0), Unit("ms", 1e-3), Unit("us", 1e-6)


def named(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have their key in the mapping as "name"."""
    return [{"name": name, **row} for name, row in rows.items()]


class Html(str):
    """Cell that is HTML already."""


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes:
        title: head.
        key: field of a row, which is a mapping or has attributes; or what takes a row and returns
            the value. Default: the title.
        form: format of the value, as `format` takes it.
        suffix: after the value: "x".
        align: "left" or "right"; default: right where there is a format.
        wraps: whether it holds sentences, which wrap on a page.
    """

    title: str
    key: str | Callable[[Any], Any] = ""
    form: str = ""
    unit: Unit | None = None
    suffix: str = ""
    align: str = ""
    wraps: bool = False

    @property
    def head(self) -> str:
        return f"{self.title} ({self.unit.name})" if self.unit else self.title

    @property
    def side(self) -> str:
        return self.align or ("right" if self.form else "left")

    def cell(self, row: Any) -> str:
        """Text of a row's value; a dash where there is none."""
        key = self.key or self.title
        if callable(key):
            value = key(row)
        else:
            value = row.get(key) if isinstance(row, Mapping) else getattr(row, key)
        if value is None:
            return "-"
        if self.unit:
            value = value / self.unit.size
        return value if isinstance(value, str) else format(value, self.form) + self.suffix


@dataclass(frozen=True)
class Table:
    """Rows, and the columns that show them."""

    columns: Sequence[Column]
    rows: Sequence[Any]

    def cells(self) -> list[list[str]]:
        """Cells of every row as text."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def text(self, indent: str = "") -> str:
        """Table for a terminal."""
        rows = [[column.head for column in self.columns], SEPARATING_LINE,
                *([printable(cell) for cell in cells] for cells in self.cells())]
        return textwrap.indent(tabulate(rows, tablefmt=_TERMINAL, **self._settings), indent)

    def markdown(self) -> str:
        """Table in Markdown."""
        rows = [[cell.replace("|", "\\|") for cell in row] for row in self.cells()]
        heads = [column.head for column in self.columns]
        return tabulate(rows, heads, "pipe", **self._settings)

    def html(self, caption: str = "", marked: Collection[int] = ()) -> str:
        """Table in HTML; cells are escaped but for those of `Html`.

        Args:
            caption: below which the table stands.
            marked: numbers of rows with a wash behind them.
        """
        about = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        head = self._html_row([column.head for column in self.columns], head=True)
        body = "\n".join(self._html_row(cells, mark=" class=mark" if i in marked else "")
                         for i, cells in enumerate(self.cells()))
        # A box that scrolls takes the focus, so that the arrow keys scroll it.
        name = html.escape(caption or f"Table: {', '.join(c.head for c in self.columns)}")
        return (f'<div class="scroll" role="group" tabindex="0" aria-label="{name}"><table>{about}'
                f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>")

    def _html_row(self, cells: Sequence[str], head: bool = False, mark: str = "") -> str:
        """Row whose cells are heads of columns; or the first, if it says something, the row's."""
        made = []
        for number, (column, cell) in enumerate(zip(self.columns, cells, strict=True)):
            kind = (" class=text" if column.wraps else " class=left" if column.side == "left"
                    else "")
            tag = "th" if cell and (head or number == 0) else "td"
            scope = f" scope={'col' if head else 'row'}" if tag == "th" else ""
            inside = cell if isinstance(cell, Html) else html.escape(printable(cell))
            made.append(f"<{tag}{scope}{kind}>{inside}</{tag}>")
        return f"<tr{mark}>{''.join(made)}</tr>"

    @property
    def _settings(self) -> dict[str, Any]:
        """Cells are drawn as they are: zeros at the end of numbers and indents too."""
        return {"disable_numparse": True, "preserve_whitespace": True,
                "colalign": [column.side for column in self.columns]}


def read_csv(path: Path, what: str, remedy: str) -> list[list[str]]:
    """Reads a table with commas, its head first, as this package and spreadsheets write it: with or
    without a byte order mark, lines that end at LF or CR LF.

    Args:
        what: it is a table of, for the message, as is the remedy.

    Raises:
        ValueError: it is not UTF-8 or no such table, a line is there twice, or one has another
            number of values than the first.
    """
    try:
        text = read_bytes(path, MOST_CSV_BYTES, remedy).decode("utf-8-sig")
        lines = list(csv.reader(lines_of(text), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of {what} ({error}); {remedy}") from None
    first: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise ValueError(f"{path}, line {number} has another number of values than the first "
                             f"line; {remedy}")
        if first.setdefault(tuple(line), number) != number:
            raise ValueError(f"{path}, line {number} is line {first[tuple(line)]} again; {remedy}")
    return lines or [[]]
