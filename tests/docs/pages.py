"""Pages of the manual, their code blocks with the mark above each, and the commands in them.

A mark is an HTML comment in the line above a block:

    <!-- run: tests/docs/test_x.py -->            the test runs it as it stands
    <!-- checked: tests/docs/test_x.py -->        the test holds it against what it quotes
    <!-- same: README.md -->                      the same commands are run there
    <!-- not run: needs eight GPUs -->            why it is not run; its words are checked too
    <!-- shown -->                                no command: a listing or a template
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "docker/README.md",
                ROOT / "tests/README.md"})
# Every block of these is a recipe, or a command that measures and takes minutes to days.
MEASURED = ("docs/results", "docs/benchmarks", "docs/performance.md")
MARK = re.compile(r"<!-- (run|checked|same|not run|shown)(?:: (.*?))? -->", re.S)
BLOCK = re.compile(r"(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)\n *```"
                   r"|(?<=\n\n)(?P<plain>(?:    [^\n]*\n)+)", re.S)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: its path in the repository.
        line: its first line on the page.
        language: of a fence; "" where none is given or the block is indented.
        mark, said: of the comment above, and what follows it; "" where there is none.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    said: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, fenced and indented."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        mark = MARK.search(match["above"] or "")
        inside = match["plain"] or match["text"]
        line = text.count("\n", 0, match.start("plain" if match["plain"] else "text")) + 1
        found.append(Block(name(page), line, match["language"] or "", inside,
                           *((mark[1], " ".join((mark[2] or "").split())) if mark else ("", ""))))
    return found


ALL = [block for page in PAGES for block in blocks(page)]
STARTS = re.compile(r"(?:\S+=\S* )*(?:(?:\S*/)?python\d? (?!-)|torchrun |deepspeed |srun |"
                    r"sbatch |make |(?:\S+/)?launch/\w+\.sh)")


def commands(text: str) -> list[list[str]]:
    """Words of every command of the project in a block, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if STARTS.match(line)]


def spans(page: Path) -> list[str]:
    """Commands of the project that stand in a page's running text."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`", text)]
    return [span for span in found if STARTS.match(span)]
