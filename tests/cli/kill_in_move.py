"""kill -9 in the middle of a move of the masks, then the run again at another layout.

    python tests/cli/kill_in_move.py RECIPE OUTPUT PLACE UPDATE RANKS_KILLED WORD...

A rank dies where it has chosen for one weight of the update'th move ("choosing"), where some of a
state has gone to its new place ("carrying"), or where masks are new in some weights ("masking").
The first start is at tensor 2, the second goes on with the words. Prints the exit codes of both as
JSON.
"""

import json
import os
import signal
import sys

import forked_ranks

RANKS = 2
CALLS = 2  # of what is patched, in the move, before a rank dies


def main() -> None:
    recipe, output, place, update, killed, *words = sys.argv[1:]
    module = forked_ranks.load("pretrain")
    undo = die_in_move(place, int(update), int(killed))
    first = run(module, [recipe, f"output={output}", "parallel.tensor=2"])
    undo()
    print(json.dumps([first, run(module, [recipe, f"output={output}", *words])]))


def run(module, words: list[str]) -> list[int]:
    """Exit codes of the ranks, negative for signals."""
    port = forked_ranks.free_port()
    pids = [forked_ranks.fork(module, words, rank, RANKS, port, said="killed.txt")
            for rank in range(RANKS)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def die_in_move(place: str, update: int, killed: int):
    """Has the last `killed` ranks die in a move; returns what undoes it."""
    from megatron_spdf.engine.state import OptimizerState
    from megatron_spdf.layers.compact import CompactWeight
    from megatron_spdf.sparsity import moving
    from megatron_spdf.training.mask_moves import MaskMoves

    begun = {"moves": 0, "calls": 0}
    move = MaskMoves._move

    def counted(self):
        begun.update(moves=self.state.mask_updates + 1, calls=0)
        return move(self)

    def dying(function):
        def called(*arguments, **keywords):
            result = function(*arguments, **keywords)
            begun["calls"] += 1
            if begun["moves"] == update and begun["calls"] == CALLS and (
                    int(os.environ["RANK"]) >= RANKS - killed):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return called

    patched = {"choosing": [(moving, "moved_masks"), (moving, "kept_entries")],
               "carrying": [(OptimizerState, "put")],
               "masking": [(CompactWeight, "move_mask"), (CompactWeight, "hold")]}[place]
    before = [(owner, name, getattr(owner, name)) for owner, name in patched]
    for owner, name, function in before:
        setattr(owner, name, dying(function))
    MaskMoves._move = counted

    def undo() -> None:
        MaskMoves._move = move
        for owner, name, function in before:
            setattr(owner, name, function)
    return undo


if __name__ == "__main__":
    main()
