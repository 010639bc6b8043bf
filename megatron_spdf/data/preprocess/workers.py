"""Processes that encode batches, and hand back what they made in the order of the batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_spdf.data.preprocess.encode import Encoded, Encoder, EndOfInput, RecordBatch

# Bytes of text that are read ahead for each worker: enough that none waits, and all the memory
# there is to it.
_AHEAD_BYTES = 4 << 20

Item = RecordBatch | EndOfInput


class Workers:
    """Encodes batches in `count` processes, or, if that is 1, in this one.

    Processes are spawned: they share neither files nor locks with this one, and load no more than a
    tokenizer.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encoder, self._limit = encoder, count * _AHEAD_BYTES
        self._pool = None
        if count > 1:
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"),
                                             _prepare, (encoder,))

    def map(self, items: Iterator[Item]) -> Iterator[tuple[Item, Encoded | None]]:
        """Each item with what its batch gave, in order; None for the end of an input.

        Raises:
            ValueError: what reading or encoding raises, after the results of all batches before it.
            RuntimeError: a worker died.
        """
        if self._pool is None:
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
                yield done, _result(done, future)
            ahead += size
            pending.append((item, self._submit(item) if size else None))
        for item, future in pending:
            yield item, _result(item, future)
        if failure:
            raise failure

    def close(self) -> None:
        """Ends the processes; what they have not begun is not done."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, batch: RecordBatch) -> Future:
        try:
            return self._pool.submit(_encode, batch)
        except BrokenProcessPool as error:
            failed: Future = Future()
            failed.set_exception(error)
            return failed


def _result(item: Item, future: Future | None) -> Encoded | None:
    try:
        return future.result() if future else None
    except BrokenProcessPool:
        raise RuntimeError(
            f"a worker process died near {item.path}, line {item.records[0][0]}; if memory ran "
            "out, take fewer --workers") from None


def _prepare(encoder: Encoder) -> None:
    """Readies a worker, which ends with the process that started it, however that ends."""
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # of a terminal, which signals all processes: the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(batch: RecordBatch) -> Encoded:
    try:
        return _encoder(batch)
    except ValueError:
        raise
    except BaseException:
        raise RuntimeError(f"{batch.path}, near line {batch.records[0][0]}:\n"
                           f"{traceback.format_exc()}") from None
