"""Where a part of the suite writes its rows, and until when it has time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.engines import free_memory
from benchmarks.sizes import Scale
from megatron_spdf.files import open_to_append
from megatron_spdf.text import first_line


@dataclass
class Part:
    """A part at work.

    Attributes:
        file: lines of JSON, one a row, written as soon as a row is there.
        until: on the monotonic clock.
    """

    scale: Scale
    file: Path
    until: float

    def write(self, table: str, **row: object) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        with open_to_append(self.file) as file:
            file.write(json.dumps({"table": table, "row": {**row, "at": at}}).encode() + b"\n")

    def attempt(self, table: str, what: str, measure: Callable[[], None]) -> bool:
        """Measures, unless time is short; whether it went well."""
        if time.monotonic() > self.until:
            self.write(table, what=what, note="not begun: the part's time was nearly spent")
            return False
        try:
            measure()
        except Exception as error:  # of whatever library: the others are to have their turn
            self.write(table, what=what,
                       note=f"failed, {type(error).__name__}: {first_line(error)}")
            return False
        finally:
            free_memory()
        return True
