"""Work shared among processes, any of which may be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


class ProcessDied(Exception):
    """Raised where a process has ended before it handed back what was asked of it."""


def map_in_processes(function: Callable[[T], R], items: Sequence[T], count: int) -> list[R]:
    """What a function makes of each item, in their order.

    Each process belongs to one thread and has a pipe of its own: one that is killed, be it in the
    middle of handing back a result, closes its pipe. `ProcessPoolExecutor` waits for ever then,
    because its processes share the pipe of results, and the others keep it open. Processes are
    spawned, so that they share neither files nor locks with this one, and end with it.

    Args:
        function: of a module.
        items: plain values, which are pickled.
        count: most processes at a time.

    Raises:
        ProcessDied: a process has.
        Exception: what the function raises.
    """
    left, one_at_a_time, results = iter(enumerate(items)), threading.Lock(), {}
    failed = threading.Event()

    def serve_some() -> None:
        try:
            with _process(function) as ask:
                while not failed.is_set():
                    with one_at_a_time:
                        number, item = next(left, (None, None))
                    if number is None:
                        return
                    results[number] = ask(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(max(1, min(count, len(items)))) as threads:
        for share in [threads.submit(serve_some) for _ in range(min(count, len(items)))]:
            share.result()
    return [results[number] for number in range(len(items))]


@contextmanager
def _process(function: Callable[[T], R]) -> Iterator[Callable[[T], R]]:
    """Runs a process; gives what asks it for the function's value."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()  # the process has the only one now, so that its end is the pipe's

    def ask(item: T) -> R:
        try:
            ours.send(item)
            error, result = ours.recv()
        except (EOFError, OSError):  # the latter in the middle of a result
            process.join()
            raise ProcessDied(f"a process ended with exit code {process.exitcode}") from None
        if error is not None:
            raise error
        return result

    try:
        yield ask
    finally:
        ours.close()
        process.kill()  # it has nothing to put in order
        process.join()


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
