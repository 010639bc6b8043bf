"""A request to stop, and the helper processes that must survive it.

SIGTERM (preemption, scancel, torchrun) and SIGUSR1 (`sbatch --signal`) go to every process of a job
step, also to loader workers; were these to die of it, the last steps would fail. So they block the
two signals.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Installs the handlers; `requested` is true from the first signal on. The loop asks at every
    step and every evaluation batch."""

    def __init__(self) -> None:
        self.requested = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.requested = True


def block_in_worker(_: int) -> None:
    """`worker_init_fn` of a DataLoader: the worker never sees the two signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
