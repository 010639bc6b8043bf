"""The form in which the official scripts of WebNLG 2017 and DART compare texts: lower-cased, split
at non-words."""

from __future__ import annotations

import re

from unidecode import unidecode

REFERENCES = 3  # of an input that the official scripts of WebNLG and DART read


def split_words(text: str) -> str:
    """Every character that belongs to no word stands alone, one blank between all."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())


def webnlg_output(text: str) -> str:
    """A system's output; transliterated to ASCII first, so `½` becomes `1 / 2`."""
    return split_words(unidecode(text.strip()).lower())


def webnlg_reference(text: str) -> str:
    """A reference; transliterated last, so `½` becomes `1/2`."""
    return unidecode(split_words(text).lower())


def dart_text(text: str) -> str:
    """An output or a reference of DART, which keeps its alphabet."""
    return split_words(text.lower())
