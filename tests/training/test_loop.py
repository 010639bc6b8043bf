"""What the training loop does in which order, against lists written by hand."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_spdf.checkpoint.run_metadata import RunState
from megatron_spdf.checkpoint.saving import SaveFailed
from megatron_spdf.engine.base import StepResult
from megatron_spdf.layers.measure import SparsityDrift
from megatron_spdf.resilience.progress import PROGRESS
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.algorithms.base import Moment
from megatron_spdf.sparsity.history import Change
from megatron_spdf.training import loop, mask_moves
from megatron_spdf.training.loop import NotFinite, Trainer

STEP = 8 * 32  # tokens, of which a run of `recipe` has ten steps


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A run whose engine, data and checkpoints only note what they are asked for.

    Args:
        stage: of the run, from 0.
        losses: of its evaluations, the last one for all that follow.
        skipped, stop: steps that are skipped, and the one at which the run is asked to stop.
        stop_evaluation: whether a rank is asked to stop in an evaluation.
        failing: saves that fail, from the first on.
        state: fields of the state that the run goes on from.
    """

    def __init__(self, recipe, stage: int = 0, losses: tuple[float, ...] = (1.0,),
                 skipped: tuple[int, ...] = (), stop: int = 0, stop_evaluation: bool = False,
                 failing: int = 0, state: dict | None = None, zeros: float = 0.0):
        self.stage = stages_of(recipe)[stage]
        self.losses, self.skipped_steps, self.stop = list(losses), skipped, stop
        self.stop_evaluation, self.failing, self.zeros = stop_evaluation, failing, zeros
        self.state = RunState(**state or {})
        self.events: list[tuple] = []
        self.figures: dict[str, dict] = {}  # kind -> those recorded last
        # what an engine and a checkpointer have
        self.optimizer_steps, self.learning_rate = self.state.optimizer_steps, 1e-3
        self.models, self.choices, self.failed_in_a_row, self.directory = [], "", 0, "there"
        self.saving = None
        # what data and a log have
        self.valid_batches, self.mean_length, self.valid_tokens_per_byte = 2, 32, None
        self.active = True

    def train(self) -> int:
        return Trainer(self.stage, self, self, self, self.state, self,
                       SimpleNamespace(requested=False)).run()

    # engine
    def step(self, batch, number, tokens, stop_requested) -> StepResult:
        assert batch == number - 1
        self.events.append(("step", number))
        self.watched = PROGRESS.watched
        assert tokens == (number - self.stage.begin) * STEP
        assert PROGRESS.activity == f"step {number}"
        skipped = number in self.skipped_steps
        self.optimizer_steps += not skipped
        return StepResult(math.nan if skipped else 2.0, 0.5, skipped, stop=number == self.stop)

    def evaluate(self, batch, stop_requested) -> tuple[float, bool]:
        assert PROGRESS.watched and PROGRESS.activity == f"the evaluation at step {self.state.step}"
        return self.losses[0], self.stop_evaluation

    def measured_sparsity(self) -> dict[str, float]:
        return {name: w.sparsity + self.zeros for name, w in self.stage.plan.weights.items()}

    def state_bytes(self) -> dict[str, int]:
        return {"parameters": 1}

    # data
    def training_batches(self, first_step):
        return iter(range(first_step, 1000))

    def validation_batches(self):
        yield from (0, 1)
        if len(self.losses) > 1:
            self.losses.pop(0)

    def consumed(self, steps: int) -> int:
        return steps * STEP

    def consumed_by_source(self, steps: int) -> dict[str, int]:
        return {}

    # checkpointer
    def save(self, engine, state, measured) -> None:
        assert not PROGRESS.watched and PROGRESS.activity == f"the save at step {state.step}"
        for name, share in measured.items():
            assert share == pytest.approx(self.stage.plan.weights[name].sparsity)
        self.events.append(("save", state.step))
        error = SaveFailed("no room") if self.failing else None
        self.failing -= bool(self.failing)
        self.saving = SimpleNamespace(path="step", error=error, seconds=0.0, said=[])

    def wait(self):
        saving, self.saving = self.saving, None
        if saving:
            self.failed_in_a_row = self.failed_in_a_row + 1 if saving.error else 0
            self.events.append(("written",))
        return saving

    def poll(self):
        return None

    def note_best(self, step: int, loss: float) -> None:
        self.events.append(("best", step, loss))

    # log
    def record(self, kind: str, step: int, **figures) -> None:
        if kind in ("train", "valid", "mask"):
            assert step == self.state.step
            self.events.append((kind, step))
            self.figures[kind] = figures

    def say(self, text: str) -> None:
        if "skipped" in text:
            self.events.append(("skipped", self.state.step))

    def advance(self, loss: float) -> None:
        self.events.append(("bar", self.state.step))


def told(run: Run, *kinds: str) -> list[tuple]:
    """The events of these kinds; of all that are written down here without them."""
    kinds = kinds or ("step", "train", "valid", "save", "best", "mask")
    return [event for event in run.events if event[0] in kinds]


def steps(first: int, last: int) -> list[tuple[str, int]]:
    return [("step", number) for number in range(first, last + 1)]


def sections(**changes) -> dict:
    """A recipe of ten steps that logs, evaluates and saves at its end only."""
    base = {"log": {"every": 100}, "evaluate": {"every": 0}, "checkpoint": {"every": 0}}
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in base | changes}


END = [("train", 10), ("valid", 10), ("save", 10)]


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, [*steps(1, 10), *END]),
    ({"log": {"every": 4}},
     [*steps(1, 4), ("train", 4), *steps(5, 8), ("train", 8), *steps(9, 10), *END]),
    ({"evaluate": {"every": 3}},
     [*steps(1, 3), ("valid", 3), *steps(4, 6), ("valid", 6), *steps(7, 9), ("valid", 9),
      *steps(10, 10), *END]),
    ({"checkpoint": {"every": 4}}, [*steps(1, 4), ("save", 4), *steps(5, 8), ("save", 8),
                                    *steps(9, 10), *END]),
    # nothing is done twice where two are due at a step, and the record is of the step alone
    ({"log": {"every": 5}, "evaluate": {"every": 5}, "checkpoint": {"every": 5}},
     [*steps(1, 5), ("train", 5), ("valid", 5), ("save", 5), *steps(6, 10), *END])], ids=str)
def test_logs_evaluations_and_saves_come_when_they_are_due(recipe, changes, expected):
    run = Run(recipe(**sections(**changes)))
    assert run.train() == 0
    assert told(run) == expected
    assert run.state == RunState(10, 10, evaluated=10, tokens=10 * STEP, best_loss=1.0,
                                 best_step=run.state.best_step, worse=run.state.worse)
    assert told(run, "bar") == [("bar", number) for number in range(1, 11)]


def test_a_run_without_validation_data_evaluates_nothing(recipe):
    run = Run(recipe(**sections(evaluate={"every": 2})))
    run.valid_batches = 0
    assert run.train() == 0 and told(run) == [*steps(1, 10), ("train", 10), ("save", 10)]


@pytest.mark.parametrize(("evaluated", "first"), [(0, [("valid", 6)]), (6, [])])
def test_a_run_goes_on_where_it_was_and_makes_up_for_an_evaluation(recipe, evaluated, first):
    state = {"step": 6, "optimizer_steps": 6, "evaluated": evaluated}
    run = Run(recipe(**sections(evaluate={"every": 3})), state=state)
    assert run.train() == 0
    assert told(run) == [*first, *steps(7, 9), ("valid", 9), *steps(10, 10), *END]


def test_a_finished_run_does_nothing_more(recipe):
    state = {"step": 10, "optimizer_steps": 10, "evaluated": 10}
    run = Run(recipe(**sections()), state=state)
    assert run.train() == 0 and run.events == []


def test_the_best_is_saved_and_a_run_ends_when_nothing_gets_better(recipe):
    made = recipe(**sections(evaluate={"every": 2, "patience": 2}, checkpoint={"best": True}))
    run = Run(made, losses=(3.0, 2.0, 2.5, 2.0, 1.0))
    assert run.train() == 0
    assert told(run) == [*steps(1, 2), ("best", 2, 3.0), ("valid", 2), ("save", 2), *steps(3, 4),
                         ("best", 4, 2.0), ("valid", 4), ("save", 4), *steps(5, 6), ("valid", 6),
                         *steps(7, 8), ("valid", 8), ("save", 8)]
    assert (run.state.best_step, run.state.best_loss, run.state.worse) == (4, 2.0, 2)


def test_what_is_better_counts_anew(recipe):
    made = recipe(**sections(evaluate={"every": 2, "patience": 2}))
    run = Run(made, losses=(3.0, 4.0, 2.0, 4.0, 1.5))
    assert run.train() == 0 and run.state.step == 10
    assert told(run, "best", "save") == [("save", 10)]  # the best is kept on request only
    assert (run.state.best_step, run.state.worse) == (10, 0)


@pytest.mark.parametrize("every", [0, 6])
def test_a_run_that_is_asked_to_stop_saves_once_and_says_so(recipe, every):
    run = Run(recipe(**sections(evaluate={"every": 6}, checkpoint={"every": every})), stop=6)
    assert run.train() == 75
    assert told(run) == [*steps(1, 6), ("save", 6)] and run.state.evaluated == 0


def test_a_stop_in_an_evaluation_ends_the_run_before_it_counts(recipe):
    run = Run(recipe(**sections(evaluate={"every": 4})), stop_evaluation=True)
    assert run.train() == 75
    assert told(run) == [*steps(1, 4), ("save", 4)] and run.state.evaluated == 0


def test_a_stop_at_the_last_step_is_a_run_that_has_finished(recipe):
    run = Run(recipe(**sections()), stop=10)
    assert run.train() == 0 and told(run)[-2:] == [("train", 10), ("save", 10)]


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run(recipe):
    made = recipe(**sections(fault_tolerance={"max_skipped": 2}))
    run = Run(made, skipped=(2, 3, 5))
    assert run.train() == 0
    assert (run.state.step, run.state.optimizer_steps, run.state.skipped,
            run.state.skipped_in_a_row) == (10, 7, 3, 0)
    assert told(run, "skipped") == [("skipped", 2), ("skipped", 3), ("skipped", 5)]
    run = Run(made, skipped=(2, 4, 5, 6))
    with pytest.raises(NotFinite, match=r"^3 steps in a row up to step 6 .*max_skipped=2; nothing"):
        run.train()
    assert told(run) == steps(1, 6)


def test_a_save_of_the_last_step_that_failed_is_tried_once_more(recipe):
    made = recipe(**sections(checkpoint={"every": 10}))
    run = Run(made, failing=1)
    assert run.train() == 0 and told(run, "save") == [("save", 10)] * 2
    run = Run(made, failing=2)
    with pytest.raises(SaveFailed, match="the last 2 saves failed, see above; make room in there"):
        run.train()
    assert told(run, "save") == [("save", 10)] * 2


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_so_many_saves_may_fail_in_a_row(recipe, allowed):
    made = recipe(**sections(checkpoint={"every": 2},
                             fault_tolerance={"max_failed_saves": allowed}))
    run = Run(made, failing=allowed)
    assert run.train() == 0
    run = Run(made, failing=allowed + 1)
    with pytest.raises(SaveFailed, match=f"the last {allowed + 1} saves failed"):
        run.train()
    assert told(run, "save") == [("save", 2 * n) for n in range(1, allowed + 2)]
    assert told(run, "step")[-1] == ("step", 2 * (allowed + 2))  # where the next was due


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_is_waited_for_at_once_or_before_the_next(recipe, asynchronous):
    run = Run(recipe(**sections(checkpoint={"every": 4, "asynchronous": asynchronous})))
    run.train()
    assert told(run, "save", "written") == [("save", 4), ("written",), ("save", 8), ("written",),
                                            ("save", 10), ("written",)]
    after = run.events[run.events.index(("save", 4)) + 1]
    assert after == (("step", 5) if asynchronous else ("written",))


def test_weights_that_drift_are_not_saved(recipe):
    run = Run(recipe(**sections(), sparsity=0.75), zeros=0.01)
    with pytest.raises(SparsityDrift):
        run.train()
    assert told(run, "save") == []


@pytest.mark.parametrize("first", [0, 4])
def test_bytes_are_counted_in_the_first_step_of_a_start(recipe, first, monkeypatch):
    counting = []

    class Counter:
        bytes, total = {("all_reduce", "data"): 12}, 12

        def __enter__(self):
            counting.append("begin")
            return self

        def __exit__(self, *_) -> None:
            counting.append("end")

    monkeypatch.setattr(loop, "TrafficCounter", Counter)
    run = Run(recipe(**sections()), state={"step": first, "evaluated": first})
    step, recorded = run.step, []
    run.step = lambda batch, number, *rest: (counting.append(number), step(batch, number, *rest))[1]
    run.record = lambda kind, at, **figures: recorded.append((kind, at, figures))
    run.train()
    assert counting == ["begin", first + 1, "end", *range(first + 2, 11)]
    ((_, at, figures),) = (entry for entry in recorded if entry[0] == "bytes")
    assert at == first + 1 and figures["sent_per_step"] == 12
    assert figures["sent_by_kind"] == {"all_reduce data": 12} and figures["parameters"] == 1


@pytest.mark.parametrize(("sparsity", "share"), [
    ({"level": 0.75, "algorithm": "set", "update": {"fraction": 0.2}}, 0.25 * 0.2),
    ({"level": 0.75, "algorithm": "set", "pattern": "tile", "tile": 4,
      "update": {"fraction": 0.25}}, 0.25 * 0.25),
    ({"level": 0.5, "algorithm": "ste", "pattern": "n_m"}, 0.0)], ids=str)
def test_a_resumed_run_allows_for_zeros_that_the_last_move_may_have_born(recipe, sparsity, share):
    """No more of them than one move bears, and none in a run whose masks have not moved."""
    made = recipe(**sections(), sparsity=sparsity)

    def stored(zeros: float, updates: int) -> set[float]:
        run = Run(made, state={"mask_updates": updates})
        trainer = Trainer(run.stage, run, run, run, run.state, run, SimpleNamespace())
        level = sparsity["level"]
        found = trainer.moves.as_stored({name: level + zeros for name in run.stage.plan.weights})
        return {round(value - level, 6) for value in found.values()}

    assert stored(0.9 * share, 1) == {0.0} and stored(0.9 * share, 0) == {round(0.9 * share, 6)}
    # a slice's share of 0.2 or 0.25 is a whole number of entries or tiles
    assert all(abs(over - 0.02) < 2e-3 for over in stored(share + 0.02, 1))
    assert stored(-0.02, 1) == {-0.02}


def test_the_first_step_may_take_long_and_the_others_are_watched(recipe):
    for first in (0, 4):
        run, watched = Run(recipe(**sections()), state={"step": first, "evaluated": first}), {}
        step = run.step
        run.step = lambda batch, number, *rest, step=step, run=run, watched=watched: (
            step(batch, number, *rest), watched.update({number: run.watched}))[0]
        run.train()
        assert watched == {number: number > first + 1 for number in range(first + 1, 11)}


def test_the_pace_of_every_step_is_measured_from_before_its_data(recipe, monkeypatch):
    said = []

    class Pace:
        def __init__(self, every: int, factor: float, log):
            said.append((every, factor))

        def begin(self, step: int) -> None:
            said.append(("begin", step))

        def end(self, step: int, data_seconds: float) -> None:
            assert 0.01 <= data_seconds < 10.0
            said.append(("end", step))

    monkeypatch.setattr(loop, "Stragglers", Pace)
    run = Run(recipe(**sections(log={"ranks_every": 7, "slow_factor": 1.7})), state={"step": 7})
    batches = run.training_batches

    def slow_batches(first_step: int):
        for batch in batches(first_step):
            time.sleep(0.01)
            yield batch

    run.training_batches = slow_batches
    run.train()
    assert said == [(7, 1.7), *((what, step) for step in (8, 9, 10) for what in ("begin", "end"))]
    assert run.figures["train"]["data_seconds"] >= 0.01


def test_a_stage_has_a_schedule_of_its_own_and_ends_where_the_next_begins(recipe):
    """What tokens the schedule is at is asserted at every step."""
    made = recipe(**sections(), stages=[{"share": 0.4, "sparsity": 0.75},
                                        {"share": 0.6, "sparsity": 0.0}])
    run = Run(made)
    assert run.train() == 0
    assert told(run) == [*steps(1, 4), ("train", 4), ("valid", 4), ("save", 4)]
    state = {"step": 4, "evaluated": 4}
    run = Run(made, stage=1, state=state)
    assert run.train() == 0 and told(run) == [*steps(5, 10), *END]
    assert Run(made, stop=4).train() == 75  # the run, unlike its stage, has not finished


def test_masks_move_by_the_updates_that_were_made(recipe, monkeypatch):
    """A skipped step moves nothing and counts for none; born entries, which are zero until the next
    update, are no drift in a save before that."""
    made = recipe(**sections(checkpoint={"every": 3}), sparsity={
        "level": 0.75, "algorithm": "set", "update": {"every": 2, "stop": 0.9}})
    run, moments = Run(made, skipped=(3, 6)), []
    born = {name: round(0.01 * w.numel) for name, w in run.stage.plan.weights.items()}

    def move(engine, algorithm, when: Moment) -> dict[str, Change]:
        assert PROGRESS.watched and PROGRESS.activity == (
            f"the move of the masks at step {run.state.step}")
        moments.append((run.state.step, when))
        return {name: Change(born[name], w.active) for name, w in run.stage.plan.weights.items()}

    def measured() -> dict[str, float]:
        moved = moments and moments[-1][1].step == run.optimizer_steps
        return {name: w.sparsity + (born[name] / w.numel if moved else 0.0)
                for name, w in run.stage.plan.weights.items()}

    monkeypatch.setattr(mask_moves, "move_masks", move)
    run.measured_sparsity = measured
    assert run.train() == 0
    assert moments == [(2, Moment(1, 2, 10)), (5, Moment(2, 4, 10)), (8, Moment(3, 6, 10)),
                       (10, Moment(4, 8, 10))]
    assert told(run, "mask", "save") == [("mask", 2), ("save", 3), ("mask", 5), ("save", 6),
                                         ("mask", 8), ("save", 9), ("mask", 10), ("save", 10)]
    assert run.state.mask_updates == 4
    assert run.figures["mask"]["moved"] == sum(born.values()) > 1000
    assert 0.0 <= run.figures["mask"]["seconds"] < 60.0


def test_a_request_to_stop_is_told_to_every_step_and_every_batch_of_an_evaluation(recipe):
    run = Run(recipe(**sections(evaluate={"every": 2})))
    stop, told, step, evaluate = SimpleNamespace(requested=False), [], run.step, run.evaluate

    def told_step(batch, number, tokens, stop_requested):
        told.append((number, stop_requested))
        stop.requested = number == 2  # while it runs
        return step(batch, number, tokens, stop_requested)

    def told_evaluation(batch, stop_requested):
        told.append(("evaluation", stop_requested))
        return evaluate(batch, stop_requested)

    run.step, run.evaluate = told_step, told_evaluation
    Trainer(run.stage, run, run, run, run.state, run, stop).run()
    assert told[:7] == [(1, False), (2, False), *[("evaluation", True)] * 2, (3, True), (4, False),
                        ("evaluation", False)]
