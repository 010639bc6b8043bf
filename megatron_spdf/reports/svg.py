"""Matplotlib's SVG made fit to stand in a page: small, in the page's colors, with identifiers of
its own and a description."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"#([\w.-]+)\)?$")
_DRAWN = ("d", "x", "y", "points", "transform", "width", "height", "viewBox")


def inline(text: str, name: str, about: str, theme: Mapping[str, str]) -> str:
    """SVG element of a document that matplotlib wrote with its text as text.

    Coordinates are rounded to hundredths of a point. Of the identifiers stay those that something
    refers to, with the name before them, and those that the caller gave.

    Args:
        text: SVG document.
        name: of the plot, one on a page.
        about: what screen readers say.
        theme: color in lower case -> variable of the page's style.
    """
    root = ElementTree.fromstring(text)
    prefix = re.sub(r"\W+", "-", name.lower())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    elements = list(root.iter())
    referred = {found[1] for element in elements for key, value in element.attrib.items()
                if key.endswith("href") or key == "clip-path"
                if (found := _REFERENCE.search(value))}
    for element in elements:
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element, prefix, referred, theme))
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    root.attrib = {"role": "img", "aria-label": about} | root.attrib
    return ElementTree.tostring(root, "unicode")


def _attributes(element: ElementTree.Element, prefix: str, referred: set[str],
                theme: Mapping[str, str]):
    """Name and value of each attribute that stays."""
    for key, value in element.attrib.items():
        key = key.rpartition("}")[2]
        if key == "id":
            if value in referred:
                yield key, f"{prefix}-{value}"
            elif value.startswith("series-"):
                yield "class", value
        elif key == "href" or key == "clip-path":
            yield key, _REFERENCE.sub(lambda found: found[0].replace("#", f"#{prefix}-", 1), value)
        elif key == "style":
            value = re.sub(r"font-family: [^;]*;? ?", "", value)
            yield key, _COLOR.sub(lambda found: f"var({theme[found[0]]})"
                                  if found[0] in theme else found[0], value)
        elif key in _DRAWN:
            yield key, " ".join(_NUMBER.sub(lambda found: f"{float(found[0]):.2f}", value).split())
        else:
            yield key, value
