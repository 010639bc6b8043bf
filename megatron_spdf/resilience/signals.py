"""Requests to stop by signal, and helper processes that ignore them.

SIGTERM (preemption, scancel, torchrun) and SIGUSR1 (`sbatch --signal`) go to every process of a job
step, loader workers included. Workers block both signals, since the last steps and the save still
need them.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # its exit handler, registered on import, must run after ours
import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Handlers of the signals.

    Attributes:
        requested: true from the first signal on. The loop reads it at every step and every
            evaluation batch.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.requested = True


def block_in_worker(_: int) -> None:
    """Blocks both signals in a DataLoader's worker, as its `worker_init_fn`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@atexit.register
def _end_workers() -> None:
    """Ends at exit the workers that an error has left, since Python would end them with a signal
    that they block, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for a killed worker
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
