"""Processes that encode batches, and hand back what they made in the order of the batches."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from megatron_spdf.data.preprocess.encode import Encoded, Encoder, EndOfInput, RecordBatch
from megatron_spdf.processes import ProcessDied, Processes

# Bytes of text that are read ahead for each worker: enough that none waits, and all the memory
# there is to it.
_AHEAD_BYTES = 4 << 20

Item = RecordBatch | EndOfInput


class Workers:
    """Encodes batches in `count` processes, or, if that is 1, in this one.

    Processes load no more than a tokenizer.
    """

    def __init__(self, encoder: Encoder, count: int):
        self._encoder, self._limit = encoder, count * _AHEAD_BYTES
        self.processes = Processes(partial(_encode, encoder), count) if count > 1 else None

    def map(self, items: Iterator[Item]) -> Iterator[tuple[Item, Encoded | None]]:
        """Each item with what its batch gave, in order; None for the end of an input.

        Raises:
            ValueError: what reading or encoding raises, after the results of all batches before it.
            RuntimeError: a worker died.
        """
        if self.processes is None:
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
            pending.append((item, self.processes.submit(item) if size else None))
        for item, future in pending:
            yield item, _result(item, future)
        if failure:
            raise failure

    def close(self) -> None:
        """Ends the processes; what they have not done is not done."""
        if self.processes:
            self.processes.close()


def _result(item: Item, future: Future | None) -> Encoded | None:
    try:
        return future.result() if future else None
    except ProcessDied:
        raise RuntimeError(
            f"a worker process died near {item.path}, line {item.records[0][0]}; if memory ran "
            "out, take fewer --workers") from None


def _encode(encoder: Encoder, batch: RecordBatch) -> Encoded:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has threads enough in the others
    try:
        return encoder(batch)
    except ValueError:
        raise
    except BaseException:
        raise RuntimeError(f"{batch.path}, near line {batch.records[0][0]}:\n"
                           f"{traceback.format_exc()}") from None
