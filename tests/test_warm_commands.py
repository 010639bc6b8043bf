"""A command that begins warm is as one of an interpreter of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from warm_commands import Warm, run_warm

pytestmark = pytest.mark.slow

SCRIPT = """
import atexit, multiprocessing, os, sys, threading, time
import beside, found
atexit.register(print, "last")
if __name__ == "__main__":
    if sys.argv[1] == "wait":
        open("waiting", "w").close()
        time.sleep(60)
    print(sys.argv[1:], os.getcwd(), sorted(n for n in os.environ if n.startswith("SPDF_TEST")))
    print("daemon", multiprocessing.current_process().daemon, multiprocessing.get_start_method())
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    if sys.argv[1] == "raise":
        raise KeyError("key")
    sys.exit({"two": 2, "none": None, "text": "said", "wide": 300}[sys.argv[1]])
"""


@pytest.fixture
def command(tmp_path):
    """A script, its directory and an environment."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "path").mkdir()
    (tmp_path / "path/found.py").write_text("")
    (tmp_path / "place").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPDF_TEST")}
    env |= {"SPDF_TEST": "1", "PYTHONPATH": str(tmp_path / "path"), "PYTHONWARNINGS": "ignore"}
    return tmp_path / "script.py", tmp_path / "place", env


@pytest.mark.parametrize("word", ["two", "none", "text", "wide", "raise"])
def test_it_says_and_returns_what_an_interpreter_does(command, monkeypatch, word):
    monkeypatch.setenv("SPDF_TEST_OF_OTHERS", "1")
    script, place, env = command
    warm = run_warm([script, word, "b c"], place, env)
    own = subprocess.run([sys.executable, script, word, "b c"], cwd=place, env=env, text=True,
                         capture_output=True, check=False)
    assert (warm.returncode, warm.stdout) == (own.returncode, own.stdout)
    assert warm.stdout.splitlines()[-2:] == ["thread", "last"]
    assert warm.stderr.splitlines()[-1:] == own.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_ends_it(command, number):
    script, place, env = command
    process = Warm([script, "wait"], place, env)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    while not (place / "waiting").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(60)[0] == "" and process.returncode == -number


def test_an_interrupt_is_an_exception(command):
    script, place, env = command
    process = Warm([script, "wait"], place, env)
    while not (place / "waiting").exists():
        time.sleep(0.01)
    for _ in range(60):  # Python drops one that arrives while an object is being deleted
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            break
    out, err = process.communicate(60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err and out == "last\n"
