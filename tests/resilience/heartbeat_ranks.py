"""Three ranks with heartbeats, forked from this process; something happens to one. Prints each case
as JSON.

    python tests/resilience/heartbeat_ranks.py DIRECTORY CASE ...

A case is `DEED RANK`: early (killed before the process groups are made), kill, stop, raise, refuse
(raises what has an exit code), stand (its training thread stands still), pause (it is stopped for
less than HANG seconds), wake (it is stopped for longer, and goes on after the others have ended),
suspend (all are stopped for longer, as in a suspended job), leave (all end as they should).
"""

import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_spdf.resilience import heartbeat, progress
from megatron_spdf.resilience.world import Ranks

WORLD, HANG = 3, 2.0
STOPPED_SECONDS = {"pause": 0.8, "suspend": 3.0, "wake": 6.0}
LAST = {"leave": 20, "pause": 40, "suspend": 40}  # step
heartbeat.BEAT_SECONDS, heartbeat.GRACE_SECONDS = 0.2, 0.6


def rank_main(rank: int, port: int, deed: str, victim: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    progress.instrument_collectives()
    with heartbeat.Heartbeat(Ranks(rank, WORLD, rank, "test"), store, HANG, {LookupError: 2}):
        store.set(f"beats/{rank}", "")
        if deed == "early" and rank == victim:
            store.wait([f"beats/{r}" for r in range(WORLD)])
            time.sleep(2 * heartbeat.BEAT_SECONDS)  # its first one has come
            os.kill(os.getpid(), signal.SIGKILL)
        dist.init_process_group("gloo", store=dist.PrefixStore("groups", store), rank=rank,
                                world_size=WORLD, timeout=timedelta(seconds=50))
        for step in range(1, 1000):
            progress.PROGRESS.set_activity(f"step {step}", watched=True)
            dist.barrier()
            time.sleep(0.05)
            if step == LAST.get(deed):
                break
            if step == 20 and rank == victim:
                suffer(deed)
    dist.destroy_process_group()


def suffer(deed: str) -> None:
    if deed == "raise":
        raise ZeroDivisionError("a batch of nothing")
    if deed == "refuse":
        raise IndexError("no such token")
    if deed == "stand":
        time.sleep(600)
    if deed in STOPPED_SECONDS and os.fork() == 0:
        ranks = os.getpgid(os.getppid())
        os.setpgid(0, 0)
        if deed == "suspend":
            os.killpg(ranks, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS[deed])
        os.killpg(ranks, signal.SIGCONT)
        os._exit(0)
    if deed not in ("leave", "suspend"):
        os.kill(os.getpid(), signal.SIGKILL if deed == "kill" else signal.SIGSTOP)


def fork(rank: int, port: int, case: str, said: Path, group: int) -> int:
    """Starts a rank in the process group of rank 0, whose pid is `group`; 0: it is rank 0."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, group or pid)
        return pid
    code = 1
    try:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
        rank_main(rank, port, case.split()[0], int(case.split()[1]))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for case in sys.argv[2:]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        said = Path(sys.argv[1]) / f"{case}.txt"
        pids: list[int] = []
        for rank in range(WORLD):
            pids.append(fork(rank, port, case, said, (pids or [0])[0]))
        codes = {}
        end = time.monotonic() + 60
        while len(codes) < WORLD and time.monotonic() < end:
            for rank, pid in enumerate(pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            others = [codes.get(r) for r in range(WORLD) if r != int(case.split()[1])]
            if case.startswith("stop") and None not in others:
                break
            time.sleep(0.02)
        for rank, pid in enumerate(pids):
            if rank not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        print(json.dumps({"case": case, "codes": [codes.get(r) for r in range(WORLD)],
                          "said": said.read_text()}))


if __name__ == "__main__":
    main()
