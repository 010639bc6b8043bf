"""Places on Markdown pages that a command fills: between `<!-- NAME -->` and
`<!-- end of NAME -->`."""

from __future__ import annotations

from pathlib import Path

from megatron_spdf.files import write_file


def write_between(page: Path, name: str, text: str) -> None:
    """Replaces what stands on a page in a place.

    Raises:
        ValueError: see `place_on`.
    """
    before, after = place_on(page, name)
    write_file(page, f"{before}\n{text}\n{after}")


def place_on(page: Path, name: str) -> tuple[str, str]:
    """What stands on a page up to `<!-- NAME -->`, and from `<!-- end of NAME -->` on.

    Raises:
        ValueError: the page has no such place, or cannot be read.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page} cannot be read ({error}); name a Markdown page") from None
    before, found, rest = text.partition(first)
    _, ends, after = rest.partition(last)
    if not found or not ends:
        raise ValueError(f"{page} has no lines {first.strip()} and {last.strip()}; write them "
                         "where the tables are to stand")
    return before + first, last + after
