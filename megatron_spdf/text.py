"""Small helpers for messages, and the escapes of what strangers wrote in them."""

from __future__ import annotations

import errno
import os
import re

# What to do about an error of the system, which says what and where, and nothing more
_REMEDIES = {
    errno.EACCES: "let this user at it (chmod, chown), or name another",
    errno.EPERM: "let this user at it (chmod, chown), or name another",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "a part of the path is a file; correct the path",
    errno.EEXIST: "remove it, or name another place",
    errno.EISDIR: "name a file",
    errno.ELOOP: "links there lead in a circle; mend them",
    errno.ENAMETOOLONG: "shorten the path",
    errno.ENOSPC: "make room on that disk, or name another place",
    errno.EDQUOT: "make room within the quota, or name another place",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f), or name another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def has_remedy(error: Exception) -> bool:
    """True if the system raised an error that a user can put right."""
    return isinstance(error, OSError) and error.errno in _REMEDIES


def sentence_of(error: Exception) -> str:
    """The message of an error for a user, with the remedy where the system raised it."""
    if not has_remedy(error) or error.strerror != os.strerror(error.errno):  # ours have their own
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {_REMEDIES[error.errno]}"


def first_line(error: Exception) -> str:
    """First line of its message, for the log."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def lines_of(text: str) -> list[str]:
    """The lines of a text file, which end at LF or CR LF and nowhere else: what else
    `str.splitlines` takes for an end, such as U+2028, is text."""
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def in_one_line(text: str) -> str:
    """The text with a blank for each end of a line inside of it, as other programs see them."""
    return " ".join(re.split("\r\n|\r|\n", text.removesuffix("\n")))


def printable(text: str) -> str:
    """A text in one line, with an escape such as \\x1b for each character that cannot be printed:
    those that a terminal obeys, that turn the direction of writing, or that are half of a pair."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """`printable` of every line."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))


def label(text: str) -> str:
    """A text as a label of a picture, where matplotlib takes dollar signs for formulas and leaves
    out of a legend what begins with an underscore."""
    plain = printable(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def counted(number: int, what: str, plural: str = "") -> str:
    """A number of things in words: `1 run`, `2,000 runs`.

    Args:
        what: one of them.
        plural: several; empty: that with an s.
    """
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def any_layer(name: str) -> str:
    """Name of a weight with a star for the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
