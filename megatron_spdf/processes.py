"""Work shared among processes, any of which may be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Generic, TypeVar

T, R = TypeVar("T"), TypeVar("R")


class ProcessDied(Exception):
    """Raised where a process has ended before it handed back what was asked of it."""


class Processes(Generic[T, R]):
    """Runs a function in processes of their own, which start as they are needed.

    Each belongs to one thread and has a pipe of its own: one that is killed, be it in the middle of
    handing back a result, closes its pipe. `ProcessPoolExecutor` waits for ever then, because its
    processes share the pipe of results, and the others keep it open. Processes are spawned, so that
    they share neither files nor locks with this one, and end with it.

    Args:
        function: of a module, or what can be pickled.
        count: most processes at a time.
    """

    def __init__(self, function: Callable[[T], R], count: int):
        self._function, self._threads = function, ThreadPoolExecutor(count)
        self._of_thread = threading.local()
        self.started: list[SpawnProcess] = []

    def submit(self, item: T) -> Future[R]:
        """Asks for the function's value of an item, a plain one, which is pickled.

        The future raises what the function raises, and `ProcessDied`.
        """
        return self._threads.submit(self._ask, item)

    def close(self) -> None:
        """Ends the processes; what they have not handed back is lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kill()  # so that no thread waits for an answer
        self._threads.shutdown()
        self._kill()  # a thread may have started one meanwhile

    def _kill(self) -> None:
        for process in list(self.started):
            process.kill()  # it has nothing to put in order
            process.join()

    def _ask(self, item: T) -> R:
        if not hasattr(self._of_thread, "pipe"):
            self._of_thread.pipe, self._of_thread.process = self._start()
        try:
            self._of_thread.pipe.send(item)
            error, result = self._of_thread.pipe.recv()
        except (EOFError, OSError):  # the latter in the middle of a result
            self._of_thread.process.join()
            raise ProcessDied("a process ended with exit code "
                              f"{self._of_thread.process.exitcode}") from None
        if error is not None:
            raise error
        return result

    def _start(self) -> tuple[Connection, SpawnProcess]:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(self._function, theirs), daemon=True)
        process.start()
        theirs.close()  # the process has the only one now, so that its end is the pipe's
        self.started.append(process)
        return ours, process


def map_in_processes(function: Callable[[T], R], items: Sequence[T], count: int) -> list[R]:
    """What a function makes of each item, in their order.

    Args:
        function: of a module.
        items: plain values, which are pickled.
        count: most processes at a time.

    Raises:
        ProcessDied: a process has.
        Exception: what the function raises.
    """
    processes = Processes(function, count)
    try:
        return [future.result() for future in [processes.submit(item) for item in items]]
    finally:
        processes.close()


def _serve(function: Callable[[T], R], pipe: Connection) -> None:
    """Answers what comes, until the pipe or the process at its other end is closed."""
    # of a terminal, which signals all processes: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_answer(function, pipe.recv()))


def _answer(function: Callable[[T], R], item: T) -> tuple[Exception | None, R | None]:
    try:
        return None, function(item)
    except Exception as error:
        error.add_note(f"in a process of its own:\n{traceback.format_exc()}")
        return error, None


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
