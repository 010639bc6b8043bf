"""One description of a table, drawn for the terminal, for Markdown and for a page."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from megatron_spdf.tables import GIB, Column, Html, Table

LONG = "decoder.layers.*.self_attention.linear_qkv.weight_v2"  # 52 characters
ROWS = [{"weight": LONG, "count": 12, "bytes": 3.5 * 2**30, "ratio": 0.5},
        {"weight": "a|b <c>", "count": 1200, "bytes": None, "ratio": 1.25}]
TABLE = Table([Column("weight"), Column("count", form=","), Column("memory", "bytes", ".2f", GIB),
               Column("ratio", form=".2f", suffix="x")], ROWS)


def test_columns_are_as_wide_as_their_longest_cell():
    head, rule, first, second = TABLE.text("  ").splitlines()
    assert first == f"  {LONG}     12          3.50  0.50x"
    assert second == f"  {'a|b <c>':<52}  1,200             -  1.25x"
    assert head == f"  {'weight':<52}  count  memory (GiB)  ratio"
    assert rule.split() == ["-" * width for width in (52, 5, 12, 5)]


def test_markdown_aligns_numbers_and_keeps_bars():
    head, rule, first, second = TABLE.markdown().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["weight", "count",
                                                                     "memory (GiB)", "ratio"]
    assert [cell.endswith(":") for cell in rule.strip("|").split("|")] == [False, True, True, True]
    assert "a\\|b <c>" in second and len(first) == len(head) == len(rule)


def test_a_page_escapes_what_is_not_html():
    page = Table([Column("name"), Column("link", lambda row: Html("<a>x</a>"))],
                 [{"name": "<b>"}]).html("of & <all>", marked=[0])
    assert ("<th scope=row class=left>&lt;b&gt;</th><td class=left><a>x</a></td>" in page
            and page.count("<th scope=col") == 2)
    assert "<caption>of &amp; &lt;all&gt;</caption>" in page and "<tr class=mark>" in page


def test_empty_cells_are_no_heads():
    page = Table([Column("", lambda row: row[0]), Column("b", lambda row: row[1])],
                 [("", "x"), ("y", "")]).html()
    assert re.findall(r"<(t[hd])(?: scope=(\w+))?(?: class=\w+)?>(\w*)<", page) == [
        ("td", "", ""), ("th", "col", "b"), ("td", "", ""), ("td", "", "x"), ("th", "row", "y"),
        ("td", "", "")]


def test_rows_may_be_objects_and_zeros_stay():
    table = Table([Column("x", form=".3f"), Column("y", str)], [SimpleNamespace(x=1.5)])
    assert "1.500  namespace(x=1.5)" in table.text()


@pytest.mark.parametrize("draw", [Table.text, Table.markdown, Table.html])
def test_a_table_without_rows_has_its_head(draw):
    assert "memory (GiB)" in draw(Table(TABLE.columns, []))
