"""Processes that encode batches, and hand back what they made in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from megatron_spdf.data.preprocess.encode import Encoded, Encoder, EndOfInput, RecordBatch

# Bytes of text that are read ahead for each worker: enough that none waits, and all the memory
# there is to it.
_AHEAD_BYTES = 4 << 20

Item = RecordBatch | EndOfInput


class Workers:
    """Encodes batches in `count` processes, or, if that is 1, in this one.

    Each process belongs to one thread and has a pipe of its own: one that is killed, be it in the
    middle of handing back a result, closes its pipe. `ProcessPoolExecutor` waits for ever then,
    because its processes share the pipe of results, and the others keep it open.
    Processes are spawned: they share neither files nor locks with this one, and load no more than a
    tokenizer.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encoder, self._limit = encoder, count * _AHEAD_BYTES
        self._threads = ThreadPoolExecutor(count) if count > 1 else None
        self._of_thread, self._pipes = threading.local(), []
        self.processes: list[SpawnProcess] = []

    def map(self, items: Iterator[Item]) -> Iterator[tuple[Item, Encoded | None]]:
        """Each item with what its batch gave, in order; None for the end of an input.

        Raises:
            ValueError: what reading or encoding raises, after the results of all batches before it.
            RuntimeError: a worker died.
        """
        if self._threads is None:
            for item in items:
                yield item, self._encoder(item) if isinstance(item, RecordBatch) else None
            return
        pending: deque[tuple[Item, Future | None]] = deque()
        ahead, failure = 0, None
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except ValueError as error:
                failure = error
                break
            size = item.size if isinstance(item, RecordBatch) else 0
            while pending and ahead + size > self._limit:
                done, future = pending.popleft()
                ahead -= done.size if future else 0
                yield done, future.result() if future else None
            ahead += size
            pending.append((item, self._threads.submit(self._encode, item) if size else None))
        for item, future in pending:
            yield item, future.result() if future else None
        if failure:
            raise failure

    def close(self) -> None:
        """Ends the processes; what they have not begun is not done."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join()

    def _encode(self, batch: RecordBatch) -> Encoded:
        """What this thread's process makes of a batch."""
        if not hasattr(self._of_thread, "pipe"):
            self._of_thread.pipe = self._start_process()
        try:
            self._of_thread.pipe.send(batch)
            encoded = self._of_thread.pipe.recv()
        except (EOFError, OSError):  # the latter in the middle of a result
            raise RuntimeError(
                f"a worker process died near {batch.path}, line {batch.records[0][0]}; if memory "
                "ran out, take fewer --workers") from None
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    def _start_process(self) -> Connection:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(self._encoder, theirs), daemon=True)
        process.start()
        theirs.close()  # the process has the only one now, so that its end is the pipe's
        self.processes.append(process)
        self._pipes.append(ours)
        return ours


def _serve(encoder: Encoder, pipe: Connection) -> None:
    """Encodes what comes, until the pipe or the process at its other end is closed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # of a terminal, which signals all processes: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_encode(encoder, pipe.recv()))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(encoder: Encoder, batch: RecordBatch) -> Encoded | Exception:
    try:
        return encoder(batch)
    except ValueError as error:
        return error
    except BaseException:
        return RuntimeError(f"{batch.path}, near line {batch.records[0][0]}:\n"
                            f"{traceback.format_exc()}")
