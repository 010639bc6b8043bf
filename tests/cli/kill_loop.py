"""kill -9 at random moments of training and saving, over and over; prints what was found as JSON.

    python tests/cli/kill_loop.py RECIPE KILLS SEED     (in the directory of the recipe)

Ranks are forked from a process that has imported everything, so that a start takes a second and not
ten.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import forked_ranks

from megatron_spdf.checkpoint import store

RANKS = 2
# seconds for the rank that is left to notice: it may have to start, and wait 45 s in the start-up
# check, three times that on a busy machine
PATIENCE = 150


def start(module, recipe: str, output: str) -> list[int]:
    """Forks the ranks of a run; their output is appended to OUTPUT.txt."""
    words, port = [recipe, f"output={output}", "parallel.tensor=2"], forked_ranks.free_port()
    return [forked_ranks.fork(module, words, rank, RANKS, port, said=f"{output}.txt")
            for rank in range(RANKS)]


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
    finished, module = True, forked_ranks.load("pretrain")
    while found["kills"] < kills or not finished:
        if finished:
            found["runs"].append(f"killed{len(found['runs'])}")
        output = found["runs"][-1]
        finished = run_once(module, recipe, output, chance, found, disturb=found["kills"] < kills)
        for checkpoint in store.visible(Path(output) / "checkpoints"):
            store.verify(checkpoint)
    print(json.dumps(found))


def run_once(module, recipe: str, output: str, chance: random.Random, found: dict,
             disturb: bool) -> bool:
    """One start of a run, killed at a random moment unless it ends before; returns whether it
    ended."""
    pids = start(module, recipe, output)
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
    victims = pids if found["kills"] % 2 else [chance.choice(pids)]
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
