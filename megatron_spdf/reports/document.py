"""Self-contained HTML page: inline style, SVG and script, nothing from the network, printable.

A policy in its head allows its own script alone, so that nothing which a run's name, recipe or
texts say can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_spdf.reports.pens import COLORS, Pen
from megatron_spdf.text import printable_lines

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_SECTION = re.compile(r"<h2 id=([\w-]+)>(.*?)</h2>")


def page(title: str, parts: Sequence[str], script: str = "") -> str:
    """HTML document of a title and the parts of its body, whose script runs at its end."""
    body = "\n".join(part for part in parts if part)
    run = f"<script>{script}</script>\n" if script else ""
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"{body}\n</main>\n{run}</body>\n</html>\n")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = f" script-src 'sha256-{digest}';" if script else ""
    return (f"default-src 'none'; style-src 'unsafe-inline';{own} base-uri 'none'; "
            "form-action 'none'")


def escape(text: object) -> str:
    """Text as HTML, with escapes such as \\x1b for what cannot be printed."""
    return html.escape(printable_lines(str(text)))


def embed(name: str, data: object) -> str:
    """Data for the page's script, as JSON in an element of that id."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def heading(text: str, level: int = 2, name: str = "") -> str:
    """Heading of a level from 1 to 6, with an id for links to it."""
    return f"<h{level}{f' id={name}' if name else ''}>{escape(text)}</h{level}>"


def contents(parts: Sequence[str]) -> str:
    """Links to the sections among the parts of a body: headings of level 2 with an id."""
    found = [match for part in parts if (match := _SECTION.match(part))]
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in (
        match.groups() for match in found))
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def paragraph(text: str, kind: str = "") -> str:
    """Paragraph of text, with a class of the style such as "lead", "note" or "warning"."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(sentences: Sequence[str]) -> str:
    """List of sentences."""
    return '<ul class="note">' + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def figure(title: str, svg: str, caption: str = "", wide: bool = False) -> str:
    """Figure with a title and a caption. A wide one takes both columns of `plots`."""
    about = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure{" class=wide" if wide else ""}><h3>{escape(title)}</h3>{svg}{about}</figure>'


def plots(figures: Sequence[str]) -> str:
    """Grid of figures, two columns wide."""
    return '<div class="plots">' + "\n".join(figures) + "</div>"


def details(summary: str, content: str, shown: bool = False) -> str:
    """Content that unfolds below its summary, and is printed unfolded."""
    return (f"<details{' open' if shown else ''}>"
            f"<summary>{escape(summary)}</summary>{content}</details>")


def legend(pens: Mapping[str, Pen]) -> str:
    """List of names with their keys, for the plots below it."""
    return ('<ul class="legend" aria-label="Legend">' + "".join(
        f"<li>{key(pen)}{escape(name)}</li>" for name, pen in pens.items()) + "</ul>")


def key(pen: Pen) -> str:
    """Piece of line that identifies runs in the plots."""
    return (f'<span class="key" style="border-top:3px {pen.style} var(--c'
            f'{COLORS.index(pen.color)})"></span>')
