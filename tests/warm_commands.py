"""Commands of the project as processes of their own that begin warm: forks of the process that has
imported the engines, see tests/distributed/harness.py. Python, PyTorch and the engines take three
seconds of a core to import, which is most of what a small run takes.

A command has its own arguments, environment, directory, output and signals. Its imports, warnings
and exit are those of a fork. Tests of these start an interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from harness import end_with_tests, forks  # noqa: E402

SAID = ("output", "errors")  # files of what a command writes


class Warm:
    """A command that runs; offers what tests use of `subprocess.Popen`.

    Args:
        command: the path of a script, and its words.
        place: its working directory.
        env: its environment, whole.
    """

    def __init__(self, command: Sequence[str | Path], place: Path, env: dict[str, str]):
        self._said = tempfile.TemporaryDirectory()
        # a daemon ends with this process
        self._process = forks().Process(daemon=True, target=_main, args=(
            [str(word) for word in command], str(place), env, self._said.name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative for signals, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits; returns standard output and standard error."""
        self.wait(timeout)
        out, err = (Path(self._said.name, name).read_text() for name in SAID)
        return out, err

    def send_signal(self, number: int) -> None:
        """Sends it unless the command has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()


def run_warm(command: Sequence[str | Path], place: Path, env: dict[str, str],
             timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs a command to its end, see `Warm`."""
    process = Warm(command, place, env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _main(command: list[str], place: str, env: dict[str, str], said: str) -> None:
    """The course of an interpreter that is given a script, from its arguments to its exit."""
    end_with_tests()
    # tests that a shell runs in its background ignore it, and so would what they fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in enumerate(SAID, 1):
        file = os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(place)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent),
                    *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # it may have workers of its own
    code = _exit_code(command[0])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
