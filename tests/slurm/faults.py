"""Stands in for the Python of a job: runs what it is given, and does at a moment of a run what
SPDF_FAULTS says.

SPDF_FAULTS is words of `OUTPUT:STAGE:STEP:RANK:DEED`, separated by blanks, each done once. STAGE is
train, evaluate or save; DEED is KILL or STOP (the signal, to the rank itself); or PAUSE: the rank
makes the file OUTPUT-paused and waits until it is gone, so that a test can act meanwhile; or WAIT,
until it is asked to stop. STEP is a number, `every3` for every time that step 3 comes, or `all`,
for every step: the deed is SLOW, to sleep 0.2 s.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ASKED: list[bool] = []


def main() -> None:
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        sys.path.insert(0, os.environ.get("PYTHONPATH", "."))
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    deeds = [word.split(":") for word in os.environ.get("SPDF_FAULTS", "").split()]
    outputs = [word.partition("=")[2] for word in sys.argv if word.startswith("output=")]
    rank = os.environ.get("SLURM_PROCID")
    mine = [d for d in deeds if outputs and d[0] == outputs[-1] and d[3] == rank]
    if mine and "--preflight" not in sys.argv:
        arm(mine)
    runpy.run_path(sys.argv[0], run_name="__main__")


def arm(deeds: list[list[str]]) -> None:
    """Waits until the ranks have joined, when the engine may be imported, and puts the deeds in
    their places."""
    from megatron_spdf.resilience.heartbeat import Heartbeat
    from megatron_spdf.resilience.progress import PROGRESS
    from megatron_spdf.resilience.signals import StopRequest

    enter, note = Heartbeat.__enter__, StopRequest._note

    def noted(self, *rest):
        ASKED.append(True)
        note(self, *rest)

    def enter_and_arm(self):
        import megatron_spdf.checkpoint.saving as saving
        import megatron_spdf.engine.megatron as engine
        import megatron_spdf.training.loop as loop

        def step(self, batch, number, *rest, inner=engine.MegatronEngine.step):
            meet("train", number)
            return inner(self, batch, number, *rest)

        def validation_loss(engine, batches, stop, inner=loop.validation_loss):
            def through():
                for i, batch in enumerate(batches):
                    if i == 1:
                        meet("evaluate", int(PROGRESS.activity.split()[-1]))
                    yield batch
            return inner(engine, through(), stop)

        def write(self, inner=saving.SaveThread._write_tensors):
            meet("save", int(self.path.name.removeprefix("step_")))
            return inner(self)

        def meet(stage: str, number: int) -> None:
            for output, wanted, at, _, deed in deeds:
                if wanted == stage and deed == "SLOW":
                    time.sleep(0.2)
                elif (wanted, at.removeprefix("every")) == (stage, str(number)):
                    do(Path(output), stage, number, deed, every=at.startswith("every"))

        engine.MegatronEngine.step = step
        loop.validation_loss, saving.SaveThread._write_tensors = validation_loss, write
        return enter(self)

    Heartbeat.__enter__, StopRequest._note = enter_and_arm, noted


def do(output: Path, stage: str, number: int, deed: str, every: bool) -> None:
    mark = output.with_name(f"{output.name}-{stage}-{number}-{deed}.done")
    if mark.exists() and not every:
        return
    mark.write_text("")
    if deed == "WAIT":
        while not ASKED:
            time.sleep(0.05)
    elif deed == "PAUSE":
        flag = output.with_name(f"{output.name}-paused")
        flag.write_text(f"{stage} {number}")
        while flag.exists():
            time.sleep(0.05)
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{deed}"))
        time.sleep(600)  # a signal to this very thread may take a moment


main()
