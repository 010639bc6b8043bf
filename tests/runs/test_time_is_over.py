"""Grids with so many minutes: what runs then is asked to save, and the same command goes on."""

from __future__ import annotations

import sys
import time

from megatron_spdf import exit_codes
from megatron_spdf.runs.grid import run_all

# Ends as our runs do when they are asked to, after it has saved, or by itself when it is there.
RUN = """
import pathlib, signal, sys, time
saved = pathlib.Path(sys.argv[1])
saved.parent.mkdir(parents=True, exist_ok=True)
def stop(*_):
    time.sleep(0.3)
    saved.write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if not saved.exists():
    pathlib.Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def commands_in(place) -> dict:
    return {place / name: [sys.executable, "-c", RUN, str(place / name / "saved"),
                           str(place / f"{name}.begun")] for name in ("first", "second")}


def test_what_runs_when_time_is_over_saves_and_nothing_more_is_begun(tmp_path):
    started, commands = time.monotonic(), commands_in(tmp_path)
    codes = run_all(commands, until=started + 5.0)
    assert codes == [exit_codes.STOPPED_ON_SIGNAL] and time.monotonic() - started < 55
    assert (tmp_path / "first/saved").read_text() == "saved"
    assert not (tmp_path / "second.begun").exists()


def test_what_does_not_know_the_signal_ends_too_and_nothing_begins_after_the_end(tmp_path):
    waits = {tmp_path / "a": [sys.executable, "-c", "import time; time.sleep(60)"]}
    assert run_all(waits, until=time.monotonic() + 0.5) == [exit_codes.STOPPED_ON_SIGNAL]
    assert run_all(commands_in(tmp_path), until=time.monotonic()) == [75]
    assert not (tmp_path / "first.begun").exists()


def test_within_its_time_a_grid_goes_on_to_its_end(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved").touch()
    assert run_all(commands_in(tmp_path), until=time.monotonic() + 60) == [0, 0]
    assert run_all({tmp_path / "third": [sys.executable, "-c", ""]}) == [0]
