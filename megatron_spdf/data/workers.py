"""Processes that encode blocks, and hand back what they made in the order of the blocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait

from megatron_spdf.data.encode import Block, Encoded, Encoder, EndOfInput

# Bytes of text that are read ahead for each worker: enough that none waits, and all the memory there is to it.
_AHEAD_BYTES = 4 << 20

Item = Block | EndOfInput


class Workers:
    """Encodes blocks in `count` processes, or, if that is 1, in this one.

    Processes are spawned: they share neither files nor locks with this one, and load no more than a tokenizer.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encode, self._limit, self._pool = encoder, count * _AHEAD_BYTES, None
        self._processes: set[multiprocessing.Process] = set()
        if count > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, _start, (encoder,))

    def map(self, items: Iterator[Item]) -> Iterator[tuple[Item, Encoded | None]]:
        """Each item with what its block gave, in order; None for the end of an input.

        Raises:
            ValueError: what reading or encoding raises, after the results of all blocks before it.
            RuntimeError: a worker died.
        """
        if self._pool is None:
            for item in items:
                yield item, self._encode(item) if isinstance(item, Block) else None
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
            size = item.size if isinstance(item, Block) else 0
            while pending and ahead + size > self._limit:
                done, encoded = self._result(*pending.popleft())
                ahead -= done.size if encoded else 0
                yield done, encoded
            ahead += size
            pending.append((item, self._submit(item) if size else None))
        while pending:
            yield self._result(*pending.popleft())
        if failure:
            raise failure

    def _submit(self, block: Block) -> Future:
        before = set(multiprocessing.active_children())
        with _death_explained(block):
            future = self._pool.submit(_encode, block)
        self._processes = self._processes or set(multiprocessing.active_children()) - before
        return future

    def _result(self, item: Item, future: Future | None) -> tuple[Item, Encoded | None]:
        with _death_explained(item):
            return item, future.result() if future else None

    def close(self) -> None:
        """Ends the processes, in the middle of their work if there is any."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.terminate()
        self._pool.shutdown(wait=True)


@contextmanager
def _death_explained(item: Item) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise RuntimeError(f"a worker process died near {item.path}, line {item.records[0][0]}; if memory ran out, "
                           "take fewer --workers") from None


def _start(encoder: Encoder) -> None:
    global _encode_block
    _encode_block = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which signals all processes: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for blocks for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(block: Block) -> Encoded:
    return _encode_block(block)


_encode_block: Encoder
