"""Runs an entry script on several ranks as torchrun does, which imports everything in every one of
them; these are forks of one process that did so once.

    python tests/cli/forked_ranks.py RANKS SCRIPT.py WORD...

SIGTERM is passed on to the ranks. When one fails, the others are asked to end. The exit code is
that of the first that fails, or 0.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# What comes before the number of ranks on Python's command line.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
FORKED = (__file__,)
ENGINES = {"pretrain": ["megatron"], "finetune": ["deepspeed", "megatron"]}


def load(script: str):
    """The module of an entry script, with all that its ranks import later."""
    module = importlib.import_module(script)
    from megatron_spdf.parallel import fake_cuda

    fake_cuda.install()
    for name in ("checkpoint.checkpointer", "data.pretraining.dataset", "training.loop",
                 *(f"engine.{engine}" for engine in ENGINES[script])):
        importlib.import_module(f"megatron_spdf.{name}")
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(module, words: list[str], rank: int, world: int, port: int,
         said: str | None = None) -> int:
    """Forks a rank; returns its process id.

    Args:
        module: of `load`.
        words: the command line after the script.
        said: file that its output is appended to; this process's output if None.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if said:
            to = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(to, 1)
            os.dup2(to, 2)
        sys.argv = [f"{module.__name__}.py", *words]
        code = module.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    world, script, words = int(sys.argv[1]), Path(sys.argv[2]).stem, sys.argv[3:]
    module, port, failed = load(script), free_port(), 0
    pids: set[int] = set()
    signal.signal(signal.SIGTERM, lambda *_: end(pids))
    pids |= {fork(module, words, rank, world, port) for rank in range(world)}
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if status and not failed:
            failed = max(1, os.waitstatus_to_exitcode(status))
            end(pids)
    return failed


def end(pids: set[int]) -> None:
    for pid in set(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
