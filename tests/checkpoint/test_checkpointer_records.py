"""What a checkpointer notes beside its checkpoints, and how it counts saves that fail."""

from __future__ import annotations

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest

from megatron_spdf.checkpoint import checkpointer as module
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.checkpointer import Checkpointer
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(module.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    return Checkpointer(tmp_path / "run" / "checkpoints", SimpleNamespace(), Plan(0, {}),
                        SimpleNamespace())


def best(made) -> dict:
    return json.loads((made.directory / store.BEST).read_text())


def test_ranks_wait_two_hours_for_a_slow_disk(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module.dist, "new_group", lambda **settings: asked.append(settings))
    Checkpointer(tmp_path, SimpleNamespace(), Plan(0, {}), SimpleNamespace())
    assert asked == [{"backend": "gloo", "timeout": timedelta(seconds=7200)}]


def test_the_best_is_written_at_once(made):
    made.note_best(12, 2.5)
    assert best(made) == {"checkpoint": store.name_of(12), "loss": 2.5}
    (made.directory / store.BEST).unlink()
    assert made._write_best() == [] and not (made.directory / store.BEST).exists()


def test_a_best_that_could_not_be_written_is_written_later(made):
    made.directory.parent.touch()  # a file where the run's directory should be
    made.note_best(12, 2.5)
    (said,) = made._write_best()
    assert said.startswith(f"could not write {store.BEST}: ")
    made.directory.parent.unlink()
    assert made._write_best() == []
    assert best(made) == {"checkpoint": store.name_of(12), "loss": 2.5}


def test_other_ranks_write_no_best(made, monkeypatch):
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    made.note_best(12, 2.5)
    assert not made.directory.exists()


def test_saves_that_fail_in_a_row_are_counted_once_each(made):
    assert made.wait() is None and made.failed_in_a_row == 0
    counts = []
    for error in (OSError("full"), OSError("full"), None, OSError("full")):
        alive, joined = [True], []
        saving = SimpleNamespace(is_alive=lambda alive=alive: alive[0], error=error,
                                 join=lambda joined=joined: joined.append(True))
        made._saving = saving
        assert made.poll() is None and not joined  # it is still written
        alive[0] = False
        assert made.poll() is saving and joined == [True]
        counts.append(made.failed_in_a_row)
        assert made.wait() is None and made.poll() is None
    assert counts == [1, 2, 0, 1]


CONSTANT = {"lr": 1e-2, "decay": "constant"}


@pytest.mark.parametrize(("change", "said"), [
    ({}, None), ({"train": {"tokens": 5120}}, None), ({"train": {"tokens": 1280}}, "train.tokens"),
    ({"optimizer": CONSTANT | {"weight_decay": 0.2}}, "optimizer.weight_decay is 0.1 there and"),
    ({"data": {"train": ["elsewhere"]}}, None)])
def test_a_checkpoint_is_of_the_run_that_it_may_go_on_as(made, recipe, change, said):
    """For longer too, where the learning rate stays; data may lie elsewhere, its content has been
    compared."""
    def run(**sections):
        values = recipe(optimizer=CONSTANT).model_dump()
        for key, section in sections.items():
            values[key] = values[key] | section
        return Recipe.model_validate(values)

    record = {"recipe": run().model_dump(), "tokenizer": {"sha256": "one"}}
    made.recipe, made.tokenizer = run(**change), SimpleNamespace(sha256="one")
    if said is None:
        made._check_run(record, made.directory)
    else:
        with pytest.raises(ValueError, match=f"checkpoints is of another run: {said}"):
            made._check_run(record, made.directory)
    made.recipe, made.tokenizer = run(), SimpleNamespace(sha256="two")
    with pytest.raises(ValueError, match="run: tokenizer is one there and two here. Use"):
        made._check_run(record, made.directory)
