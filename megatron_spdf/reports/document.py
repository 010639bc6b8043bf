"""Self-contained HTML page: inline style and SVG, no script, nothing from the network,
printable."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

STYLE = Path(__file__).with_name("page.css").read_text()


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
