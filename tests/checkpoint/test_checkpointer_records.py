"""What a checkpointer notes beside its checkpoints, and how it counts saves that fail."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from types import SimpleNamespace

import pytest

from megatron_spdf.checkpoint import checkpointer as module
from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.checkpointer import Checkpointer
from megatron_spdf.checkpoint.run_metadata import RunState
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


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("updates", [0, 2])
def test_a_save_is_handed_all_that_a_checkpoint_is(made, recipe, monkeypatch, best, updates):
    """And what is kept beside it; that every part is saved once is checked the first time."""
    saves, records, kept, tokenizers = [], [], [], []
    monkeypatch.setattr(module, "SaveThread", lambda *parts: saves.append(parts) or (
        SimpleNamespace(start=lambda: saves.append("started"))))
    monkeypatch.setattr(module, "run_record", lambda *parts: records.append(parts) or {"a": 1})
    monkeypatch.setattr(module.store, "retain", lambda *parts: kept.append(parts) or ["said"])
    made.recipe = recipe(sparsity={"level": 0.5, "algorithm": "set"}, checkpoint={
        "keep": 3, "keep_every": 20, "keep_at": [4, 8], "best": best})
    made.plan, made.tokenizer = Plan.of(made.recipe), SimpleNamespace(save=tokenizers.append)
    made._group = "group"
    state = RunState(12, best_step=10, mask_updates=updates)
    for first in (True, False):
        made.save(SimpleNamespace(state_to_save=lambda: "state"), state, {"weight": 0.5})
        (partial, saved, add_files, after, group, validated), started = saves
        assert partial == made.directory / f"{store.name_of(12)}.partial"
        assert (saved, group, validated, started) == ("state", "group", first, "started")
        saves.clear()
        made._saving = None
    moved = {"kind": "moved", "algorithm": "set", "updates": 2}
    masks = {"kind": "seeded", "how": "random, seed 0", "algorithm": "set", "updates": 0}
    assert records == [(made.recipe, made.plan, made.tokenizer, masks | (moved if updates else {}),
                        "initial values", asdict(state), {"weight": 0.5})] * 2
    partial.mkdir(parents=True)
    add_files(partial)
    assert json.loads((partial / store.RUN).read_text()) == {"a": 1}
    assert tokenizers == [partial / "tokenizer"]
    assert after() == ["said"]
    spared = {store.name_of(step) for step in (4, 8, *([10] if best else []))}
    assert kept == [(made.directory, 3, 20, spared)]


MOVED = {"kind": "moved", "how": "random, seed 3", "algorithm": "set", "updates": 2}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("boundary", "continues"), [
    (None, False), (0, False), (10, True), (12, True), (12, False)])
def test_what_a_start_takes_of_the_newest_checkpoint(made, recipe, monkeypatch, rank, sparse,
                                                     boundary, continues):
    """All of it but at a border of stages, where the count of updates goes on in a part of a stage
    alone; without one (None) nothing."""
    asked, newest = [], made.directory / store.name_of(12)
    record = {"state": {"step": 12, "optimizer_steps": 9, "mask_updates": 2, "best_loss": 1.5},
              "masks": MOVED, "origin": "elsewhere"}

    def note(place, name: str, gives=None):
        monkeypatch.setattr(place, name, lambda *parts: asked.append((name, *parts)) or gives)
    note(module, "newest_of_all", None if boundary is None else newest)
    for place, name, gives in ((module.store, "discard_incomplete", ["discarded"]),
                               (module, "read_run_record", record), (made, "_check_run", None),
                               (module, "load_across_border", None), (module, "_fill", None),
                               (module, "_open_verified", "files"),
                               (module, "_tensors_of", "tensors"), (made, "_check_masks", None)):
        note(place, name, gives)
    monkeypatch.setattr(module, "_on_all_ranks", lambda action: action())
    monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
    engine = SimpleNamespace(models=[], state_to_load=lambda: "wanted", load_state=(
        lambda *parts, **named: asked.append(("load_state", *parts, named))))
    made.plan, drawn = Plan.of(recipe(sparsity=0.5 * sparse)), made.masks
    state, said = made.restore(engine, boundary or 0, continues)
    looked = [("discard_incomplete", made.directory)] * (rank == 0)
    assert said[: rank == 0] == ["discarded"] * (rank == 0)
    said = said[rank == 0:]
    looked.append(("newest_of_all", made.directory))
    if boundary is None:
        assert (asked, said, state, made.masks) == (looked, [], RunState(), drawn)
        return
    looked += [("_open_verified", newest), ("read_run_record", newest / store.RUN),
               ("_check_run", record, newest)]
    steps, other = 9 if continues or boundary != 12 else 0, made.plan.weights
    assert state == RunState(12, steps, mask_updates=2, best_loss=1.5)
    assert made.origin == "elsewhere"
    if boundary == 12:
        assert asked == [*looked, ("load_across_border", engine, newest, steps)]
        assert said == [f"pruned {newest.name} by magnitude" if other else
                        f"densified {newest.name}"]
        assert made.masks == ({"kind": "stored", "how": "largest magnitudes at step 12",
                               "algorithm": "static", "updates": 0} if other else drawn)
    else:
        assert asked == [*looked, ("_fill", "wanted", "files"), ("_tensors_of", "wanted"),
                         ("load_state", "tensors", 9, {}), ("_check_masks", engine, [], newest)]
        assert said == [f"resumed from {newest.name}"] and made.masks == MOVED


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
