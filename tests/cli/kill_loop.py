"""kill -9 at random moments of training and saving, over and over; prints what was found as JSON.

    python tests/cli/kill_loop.py RECIPE KILLS SEED     (in the directory of the recipe)

Ranks are forked from a process that has imported everything, so that a start takes a second and not ten.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain
from megatron_spdf.parallel import cpu

cpu.install()
import megatron_spdf.checkpoint.checkpointer  # noqa: E402, F401
import megatron_spdf.data.dataset  # noqa: E402, F401
import megatron_spdf.engine.megatron  # noqa: E402, F401
import megatron_spdf.training.loop  # noqa: E402, F401
from megatron_spdf.checkpoint import store  # noqa: E402

RANKS = 2
PATIENCE = 90  # seconds for the rank that is left to notice: the recipe's limits, and what a busy machine adds


def start(recipe: str, output: str) -> list[int]:
    """Forks the ranks of a run; their output is appended to OUTPUT.txt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(recipe, output, rank, port) for rank in range(RANKS)]


def _fork(recipe: str, output: str, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    said = os.open(f"{output}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["pretrain.py", recipe, f"output={output}", "parallel.tensor=2"]
    code = 1
    try:
        code = pretrain.main()
    finally:
        sys.stdout.flush()
        os._exit(code)


def reap(pids: list[int], patience: float) -> list[int | None]:
    """Exit codes (negative: signals), None for those that did not end in time."""
    codes: list[int | None] = [None] * len(pids)
    end = time.monotonic() + patience
    while None in codes and time.monotonic() < end:
        for i, pid in enumerate(pids):
            if codes[i] is None and os.waitpid(pid, os.WNOHANG)[0]:
                codes[i] = 0
        time.sleep(0.01)
    return codes


def main() -> None:
    recipe, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    found = {"kills": 0, "of one rank": 0, "while saving": 0, "hung": 0, "runs": []}
    finished = True
    while found["kills"] < kills or not finished:
        if finished:
            found["runs"].append(f"killed{len(found['runs'])}")
        output = found["runs"][-1]
        finished = run_once(recipe, output, chance, found, disturb=found["kills"] < kills)
        for checkpoint in store.visible(Path(output) / "checkpoints"):
            store.verify(checkpoint)
    print(json.dumps(found))


def run_once(recipe: str, output: str, chance: random.Random, found: dict, disturb: bool) -> bool:
    """One start of a run, killed at a random moment unless it ends before; returns whether it ended."""
    pids = start(recipe, output)
    limit = chance.uniform(0.2, 5.0) if disturb else 300.0
    begun = time.monotonic()
    while time.monotonic() < begun + limit:
        ended = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids]
        if all(ended):
            reap(pids, PATIENCE)
            codes = [e.si_status if e.si_code == os.CLD_EXITED else -e.si_status for e in ended]
            assert codes == [0] * RANKS, (codes, Path(f"{output}.txt").read_text()[-3000:])
            return True
        time.sleep(0.005)
    assert disturb, f"{output} did not end within {limit} s"
    victims = pids if chance.random() < 0.5 else [chance.choice(pids)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    found["kills"] += 1
    found["of one rank"] += len(victims) == 1
    found["while saving"] += bool(list((Path(output) / "checkpoints").glob("*.partial")))
    for i, code in enumerate(reap(pids, PATIENCE)):
        if code is None:
            found["hung"] += 1
            os.kill(pids[i], signal.SIGKILL)
            os.waitpid(pids[i], 0)
    return False


if __name__ == "__main__":
    main()
