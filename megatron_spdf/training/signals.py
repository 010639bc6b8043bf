"""A request to stop: SIGTERM (preemption, scancel, torchrun) or SIGUSR1 (`sbatch --signal`) sets a flag that the
loop asks at every step and every evaluation batch."""

from __future__ import annotations

import signal


class StopRequest:
    """Installs the handlers; `requested` is true from the first signal on."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.requested = True
