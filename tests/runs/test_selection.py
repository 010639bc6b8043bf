"""Results of a sweep's runs, by what their newest checkpoints say, and the choice among them."""

from __future__ import annotations

import json

import pytest

from megatron_spdf.runs.grid import Trial
from megatron_spdf.runs.selection import render, result_of, select


@pytest.fixture
def result(recipe, tmp_path):
    """Result of a run of ten steps whose checkpoints have these states."""
    def of(*states: dict, patience: int = 2):
        run = recipe(evaluate={"patience": patience})
        for state in states:
            place = tmp_path / "out" / "checkpoints" / f"step_{state['step']:08d}"
            place.mkdir(parents=True)
            (place / "run.json").write_text(json.dumps({
                "state": state, "recipe": run.model_dump(), "tokens": 1, "sparsity": {},
                "tokenizer": {"kind": "gpt2", "sha256": "0"}, "versions": {}, "saved": ""}))
        return result_of(Trial({}, {"seed": 3}, tmp_path / "out"))
    return of


@pytest.mark.parametrize(("state", "patience", "done"), [
    ({"step": 9, "worse": 1}, 2, False), ({"step": 9, "worse": 2}, 2, True),
    ({"step": 9, "worse": 3}, 2, True), ({"step": 9, "worse": 5}, 0, False),
    ({"step": 9, "worse": 0}, 0, False), ({"step": 10, "worse": 0}, 0, True)])
def test_a_run_is_done_at_its_end_or_where_patience_ends_it(result, state, patience, done):
    found = result({**state, "best_step": 4, "best_loss": 2.5}, patience=patience)
    assert (found["done"], found["validation_loss"], found["step"]) == (done, 2.5, 4)
    assert found["values"] == {"seed": 3} and found["output"].endswith("out")


def test_the_newest_checkpoint_counts_and_a_run_without_one_has_not_begun(result):
    assert result() == {"output": result()["output"], "values": {"seed": 3}, "done": False,
                        "validation_loss": None, "step": None}
    found = result({"step": 10, "best_step": 0, "best_loss": None}, {"step": 2, "best_step": 2,
                                                                     "best_loss": 1.0})
    assert (found["done"], found["validation_loss"], found["step"]) == (True, None, None)


def row(name, done, loss):
    return {"output": f"out/{name}", "values": {}, "done": done, "validation_loss": loss,
            "step": 4 if loss else None}


ROWS = [row("a", True, 2.5), row("b", False, 1.0), row("c", True, 2.25), row("d", True, None),
        row("e", False, None)]


def test_the_lowest_loss_of_a_finished_run_is_selected():
    found = select(ROWS)
    assert found == {"selected": ROWS[2], "unfinished": 2, "runs": ROWS}
    assert select(ROWS[3:])["selected"] is None and select([])["unfinished"] == 0


def test_the_table_has_the_best_first_and_the_unfinished_last():
    lines = [line.split() for line in render(select(ROWS)).splitlines()[2:]]
    assert lines == [["2.2500", "4", "c"], ["2.5000", "4", "a"], ["-", "-", "d"],
                     ["1.0000", "4", "b", "unfinished"], ["-", "-", "e", "unfinished"]]
