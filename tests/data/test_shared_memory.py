"""Shared memory that is too small for loader processes is refused before the run, or named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_spdf.data.indexed.tokens import DataFault
from megatron_spdf.data.pretraining import shared_memory
from megatron_spdf.data.pretraining.dataset import _named
from megatron_spdf.data.pretraining.shared_memory import require_shared_memory

# of Python and PyTorch 2.8 under a /dev/shm of 32 and of 512 KiB, and of a kernel without room
DEATHS = [
    OSError(28, "No space left on device"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 1.\nunable to write to file "
                 "</torch_1>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                 "dataloader's workers are out of shared memory."),
]


class Samples:
    read_from: list = []


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of shared memory."""
    def set_free(number: int) -> None:
        fields = [4096, 4096, 1 << 40, 1 << 40, number // 4096, 0, 0, 0, 0, 255]
        monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: os.statvfs_result(fields))
    return set_free


def test_loader_processes_that_do_not_fit_are_refused(recipe, free):
    made = recipe(data={"workers": 2})
    held = 2 * 2 * made.micro_batches  # two processes, two steps each
    bytes_held = held * made.train.micro_batch * made.train.sequence_length * 28
    whatever = recipe(data={"workers": 2}, train={"micro_batch": "auto"})
    free(-(-bytes_held // 4096) * 4096)
    require_shared_memory(made)
    require_shared_memory(whatever)
    free(bytes_held // 4096 * 4096 - 4096)
    with pytest.raises(ValueError, match="data.workers=2"):
        require_shared_memory(whatever)
    with pytest.raises(ValueError, match=r"data.workers=2: /dev/shm has 0.\d MiB free.*"
                                         "shm-size.*data.workers=0"):
        require_shared_memory(made)
    require_shared_memory(recipe(data={"workers": 0}))


@pytest.mark.parametrize("death", DEATHS, ids=str)
def test_what_a_loader_process_died_of_is_named(death, free):
    free(4096)
    with pytest.raises(DataFault, match="no room in /dev/shm, which has 0.0 MiB free; .*workers=0"):
        with _named(Samples()):
            raise death


def test_another_death_is_passed_on():
    with pytest.raises(RuntimeError, match="Killed"), _named(Samples()):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def test_a_program_ends_though_an_error_has_left_loader_processes():
    """They block the signal with which Python ends such processes."""
    program = """
import multiprocessing, time
from megatron_spdf.resilience.signals import block_in_worker
def work(ready):
    block_in_worker(0)
    ready.set()
    time.sleep(600)
context = multiprocessing.get_context("fork")
ready = context.Event()
context.Process(target=work, args=(ready,), daemon=True).start()
ready.wait()
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 7
