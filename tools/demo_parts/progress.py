"""One progress bar for several parts, some of them at once, and a line for each that ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from demo_parts.work import Work
from megatron_spdf.files import open_to_append

LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Part:
    """A part of the demo.

    Attributes:
        name: that its line begins with; of letters that a file may have.
        seconds: that it takes on two quiet cores.
        works: of the part, one after another.
        said: what came of it, in a few words, once it is done.
    """

    name: str
    seconds: float
    works: Sequence[Work]
    said: Callable[[], str]


class Progress:
    """Performs parts and shows how far they are.

    The bar is on standard error where that is a terminal, lines are on standard output. A part that
    was done at an earlier start is not done again.

    Args:
        seconds: of all parts.
        done: directory of a file for each part that is done.
        width: of the longest name.
    """

    def __init__(self, seconds: float, done: Path, width: int):
        self._done, self._width, self._behind = done, width, 0.0
        tqdm.monitor_interval = 0  # a thread of its own would not do with forks
        self._bar = tqdm(total=seconds, dynamic_ncols=True, disable=None, leave=False,
                         bar_format="{percentage:3.0f}% {bar} {desc}")

    def say(self, text: str) -> None:
        """Prints a text above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def perform(self, parts: Sequence[Part], at_once: int = 1,
                meanwhile: Callable[[], None] = lambda: None) -> None:
        """Performs parts, so many at a time, and prints what came of each.

        Args:
            meanwhile: what this process does while the first are under way.

        Raises:
            Failed: one failed; the others are stopped.
        """
        waiting, running = list(parts), []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(_Running(waiting.pop(0), self._done))
                    running[-1].start()
                meanwhile()
                meanwhile = _nothing
                for part in [part for part in running if part.over()]:
                    running.remove(part)
                    self._end(part)
                self._show(running)
                if running:
                    time.sleep(LOOK_SECONDS)
        finally:
            for part in running:
                part.stop()

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def _end(self, part: _Running) -> None:
        self._behind += part.part.seconds
        seconds = "before" if part.before else f"{part.seconds:.0f} s"
        self.say(f"{part.part.name:{self._width}}  {seconds:>6}  {part.part.said()}")

    def _show(self, running: Sequence[_Running]) -> None:
        self._bar.set_description_str(", ".join(r.part.name for r in running), refresh=False)
        self._bar.n = self._behind + sum(r.part.seconds * r.share() for r in running)
        self._bar.refresh()


class _Running:
    """A part under way."""

    def __init__(self, part: Part, done: Path):
        self.part, self._mark = part, done / part.name.replace(" ", "_").replace("%", "")
        self.before = self._mark.exists()
        self._works = [] if self.before else list(part.works)
        self._current: Work | None = None
        self._begin, self.seconds = time.monotonic(), 0.0

    def start(self) -> None:
        """Starts the next work, if there is one."""
        self._current = self._works.pop(0) if self._works else None
        if self._current:
            self._current.start()

    def over(self) -> bool:
        """Starts the next work where one has ended; whether none is left."""
        if self._current and not self._current.ended():
            return False
        self.start()
        if self._current:
            return False
        self.seconds = time.monotonic() - self._begin
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        open_to_append(self._mark).close()
        return True

    def share(self) -> float:
        """Share of the part that is done, in [0, 1]."""
        ahead = len(self._works) + 1 - (self._current.share() if self._current else 0.0)
        return 1 - min(1.0, ahead / max(1, len(self.part.works)))

    def stop(self) -> None:
        if self._current:
            self._current.stop()


def _nothing() -> None:
    pass

