"""Run the tests of one thing, with output to read: make test-one K=EXPRESSION.

EXPRESSION is a file, a test (tests/data/test_blend.py::test_x), or what pytest takes for -k: words
of names, with "and", "or" and "not". Files in which none of the words occurs are not imported, so
it starts at once; where that leaves no test, all files are looked through.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READABLE = ["-vv", "--tb=short", "-ra", "--durations=3", "--durations-min=0.5"]


def files_with(expression: str) -> list[str]:
    """Test files in whose path or text one of the words occurs that an expression does not
    negate; none: it has no such word."""
    words = {word for word in re.findall(r"\w+", re.sub(r"\bnot\s+\w+", "", expression.lower()))
             if word not in ("and", "or", "not")}
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if any(word in f"{path.relative_to(ROOT)}\n{path.read_text()}".lower()
                   for word in words)]


def arguments_for(expression: str) -> list[list[str]]:
    """Arguments of pytest in the order in which they are tried until a test is found."""
    if Path(expression.partition("::")[0]).exists():
        return [[expression]]
    narrow = files_with(expression)
    return [[*files, "-k", expression] for files in ([narrow] if narrow else []) + [["tests"]]]


def main(words: Sequence[str]) -> int:
    """Runs the tests; returns pytest's exit code."""
    if len(words) != 1 or not words[0].strip():
        print('name what to test: make test-one K=test_blend, or K="losses and tp2"',
              file=sys.stderr)
        return 2
    for arguments in arguments_for(words[0].strip()):
        code = pytest.main([*READABLE, *arguments])
        if code != pytest.ExitCode.NO_TESTS_COLLECTED:
            break
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
