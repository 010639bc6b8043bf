"""When masks move in a run, and what is counted: by the numbers of steps, with an engine and an
algorithm of nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_spdf.engine.base import StepResult
from megatron_spdf.training import mask_moves
from megatron_spdf.training.mask_moves import MaskMoves


@pytest.fixture
def moves(monkeypatch):
    """Moves of an algorithm that is due at every second step, and what is done; `keeps`: one whose
    weights choose their masks in the next step."""
    def make(keeps: bool, weights=("w",)) -> MaskMoves:
        done: list = []
        algorithm = SimpleNamespace(keeps=keeps, holds=False, needs="nothing",
                                    due=lambda step, steps: step % 2 == 0)
        monkeypatch.setattr(mask_moves, "choose_masks", lambda models: done.append("chosen"))
        monkeypatch.setattr(mask_moves, "count_chosen", lambda engine: {"w": "counted"})
        monkeypatch.setattr(mask_moves, "move_masks", lambda engine, rule, when: done.append(
            ("moved", when.update, when.step, when.steps)) or {"w": SimpleNamespace(moved=3)})
        recipe = SimpleNamespace(sparsity=SimpleNamespace(update=algorithm),
                                 log=SimpleNamespace(every=4))
        stage = SimpleNamespace(recipe=recipe, steps=8, continues=False,
                                plan=SimpleNamespace(weights=dict.fromkeys(weights)))
        state = SimpleNamespace(step=0, optimizer_steps=0, mask_updates=0)
        engine = SimpleNamespace(models=[], optimizer_steps=0)
        report = SimpleNamespace(moved=lambda changed, *_: done.append(("reported", state.step)))
        made = MaskMoves(stage, engine, state, report)
        made.done = done
        return made
    return make


def run(moves: MaskMoves, skipped: set[int], steps: int = 8) -> None:
    """Steps of a run, of which some are skipped: numbers of optimizer steps stay behind then."""
    for step in range(1, steps + 1):
        moves.before_step()
        moves.state.step = step
        if step not in skipped:
            moves.engine.optimizer_steps += 1
            moves.state.optimizer_steps += 1
        moves.after_step(StepResult(1.0, 1.0, skipped=step in skipped, stop=False))


def test_masks_move_where_they_are_due_and_a_skipped_step_makes_up_for_it(moves):
    made = moves(keeps=False)
    run(made, skipped={2})
    assert [word for word in made.done if word[0] == "moved"] == [
        ("moved", 1, 2, 8), ("moved", 2, 4, 8), ("moved", 3, 6, 8)]
    assert [word[1] for word in made.done if word[0] == "reported"] == [3, 5, 7]
    assert made.state.mask_updates == 3 and made.born == {"w": 3}


def test_weights_choose_where_that_is_due_and_not_after_a_skipped_step(moves):
    made = moves(keeps=True)
    run(made, skipped={2})
    assert made.done.count("chosen") == made.state.mask_updates == 3
    # of the choices of steps 3, 5 and 7, those that the log of steps 4 and 8 has
    assert [word for word in made.done if word != "chosen"] == [("reported", 4), ("reported", 8)]


@pytest.mark.parametrize("keeps", [False, True])
def test_without_sparse_weights_nothing_moves(moves, keeps):
    made = moves(keeps, weights=())
    run(made, skipped=set())
    assert made.done == [] and made.state.mask_updates == 0
