"""Processes that encode batches, and hand back what they made in the order of the batches.

Not a ProcessPoolExecutor: its processes outlive a parent that is killed, and it waits for work that
nobody wants any more. Here a pipe leads to each process, and whichever end is left alone ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection

from megatron_spdf.data.preprocess.encode import Encoded, Encoder, EndOfInput, RecordBatch

# Bytes of text that are read ahead for each worker: enough that none waits, and all the memory
# there is to it.
_AHEAD_BYTES = 4 << 20
_BATCHES_AT_A_WORKER = 2  # the one in work and the next

Item = RecordBatch | EndOfInput


class Workers:
    """Encodes batches in `count` processes, or, if that is 1, in this one.

    Processes are spawned: they share neither files nor locks with this one, and load no more than a
    tokenizer.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encoder, self._limit = encoder, count * _AHEAD_BYTES
        self._waiting: queue.SimpleQueue[tuple[RecordBatch, Future]] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._processes = []
        for _ in range(count if count > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, encoder), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def map(self, items: Iterator[Item]) -> Iterator[tuple[Item, Encoded | None]]:
        """Each item with what its batch gave, in order; None for the end of an input.

        Raises:
            ValueError: what reading or encoding raises, after the results of all batches before it.
            RuntimeError: a worker died.
        """
        if not self._processes:
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
            pending.append((item, self._submit(item) if size else None))
        for item, future in pending:
            yield item, future.result() if future else None
        if failure:
            raise failure

    def close(self) -> None:
        """Ends the processes, in the middle of their work if there is any."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _submit(self, batch: RecordBatch) -> Future:
        future: Future = Future()
        self._waiting.put((batch, future))
        return future

    def _serve(self, worker: Connection) -> None:
        """Passes batches to one worker, the next before it is done with the last, and takes its
        results."""
        given: deque[tuple[RecordBatch, Future]] = deque()
        while True:
            try:
                while len(given) < _BATCHES_AT_A_WORKER:
                    batch, future = self._waiting.get(block=not given)
                    given.append((batch, future))
                    worker.send(batch)
            except queue.Empty:
                pass
            except OSError:
                return _fail(given)
            try:
                result = worker.recv()
            except (EOFError, OSError):
                return _fail(given)
            _, future = given.popleft()
            if isinstance(result, Encoded):
                future.set_result(result)
            else:
                future.set_exception(result)


def _fail(given: deque[tuple[RecordBatch, Future]]) -> None:
    for batch, future in given:
        future.set_exception(RuntimeError(
            f"a worker process died near {batch.path}, line {batch.records[0][0]}; if memory ran "
            "out, take fewer --workers"))


def _work(parent: Connection, encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # of a terminal, which signals all processes: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    batches: queue.Queue[RecordBatch] = queue.Queue(_BATCHES_AT_A_WORKER)
    threading.Thread(target=_receive, args=(parent, batches), daemon=True).start()
    while True:
        batch = batches.get()
        try:
            result = encoder(batch)
        except ValueError as error:
            result = error
        except BaseException:
            result = RuntimeError(f"{batch.path}, near line "
                                  f"{batch.records[0][0]}:\n{traceback.format_exc()}")
        parent.send(result)


def _receive(parent: Connection, batches: queue.Queue[RecordBatch]) -> None:
    """Beside the work, so that the parent never waits to pass a batch on while its result waits to
    be taken."""
    try:
        while True:
            batches.put(parent.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone
