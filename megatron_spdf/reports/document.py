"""Self-contained HTML page: inline style and SVG, no script, nothing from the network,
printable."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { --ink: #1d2129; --soft: #5c6470; --line: #d9dde3; --wash: #f5f6f8; --accent: #0b5fa5; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.6rem 4rem; max-width: 1120px; color: var(--ink);
       background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
       sans-serif; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem;
       border-bottom: 2px solid var(--ink); }
p { margin: .4rem 0; max-width: 52rem; }
p.lead, .note, figcaption, caption { color: var(--soft); }
.note, figcaption, caption { font-size: .86rem; }
ul { margin: .2rem 0 .6rem; padding-left: 1.2rem; max-width: 58rem; }
p.warning { border-left: 4px solid #b3541e; padding: .3rem .8rem; background: #fdf4ee; }
a { color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem;
       margin: .5rem 0; }
caption { text-align: left; padding-bottom: .3rem; caption-side: top; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--line);
       white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
thead th { border-bottom: 1.5px solid var(--ink); }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
td.text, th.text { text-align: left; white-space: normal; min-width: 16rem; }
tr.mark td { background: var(--wash); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.1rem 1.4rem;
       margin: .8rem 0; }
figure { margin: 0; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figure h3 { font-size: .95rem; margin: 0 0 .2rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
details { margin: .3rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .88rem; }
pre { font-size: .8rem; background: var(--wash); padding: .7rem; overflow-x: auto; }
@media (max-width: 720px) { .plots { grid-template-columns: 1fr;
       } body { padding: 1.2rem .8rem 3rem; } }
@page { size: A4; margin: 14mm 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  table, figure { break-inside: avoid; }
  table { font-size: 7.6pt; }
  th, td { padding: .2rem .35rem; }
  .scroll { overflow: visible; }
  details { display: none; }
  a { color: inherit; text-decoration: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """HTML document of a title and the parts of its body."""
    body = "\n".join(parts)
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
            'name="viewport" content="width=device-width, '
            f'initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def escape(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def heading(text: str, level: int = 2) -> str:
    """Heading of a level from 1 to 6."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Paragraph of text, with a class of the style such as "lead", "note" or "warning"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """List of sentences."""
    return '<ul class="note">' + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "",
          marked: Sequence[int] = (), text_columns: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; column names are text, in which a newline breaks the
    line.

    Args:
        marked: rows with a wash behind them.
        text_columns: columns of sentences, which wrap.
    """
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(f'<{tag}{" class=text" if i in text_columns else ""}>{v}</{tag}>' for i,
                       v in enumerate(values))

    names = cells([escape(name).replace("\n", "<br>") for name in head], "th")
    lines = "\n".join(f'<tr{" class=mark" if i in marked else ""}>{cells(row, "td")}</tr>'
                      for i, row in enumerate(rows))
    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    return ('<div '

                  f'class="scroll"><table>{about}<thead><tr>{names}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>'
            "</div>")


def figure(title: str, svg: str, caption: str = "", wide: bool = False) -> str:
    """Figure with a title and a caption. A wide one takes both columns of `plots`."""
    about = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure{" class=wide" if wide else ""}><h3>{escape(title)}</h3>{svg}{about}</figure>'


def plots(figures: Sequence[str]) -> str:
    """Grid of figures, two columns wide."""
    return '<div class="plots">' + "\n".join(figures) + "</div>"


def key(color: str) -> str:
    """Colored square that identifies a run in the plots."""
    return f'<span class="key" style="background:{color}"></span>'
