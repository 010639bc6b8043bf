"""The run directory: one recipe's run, another's is refused, and so is what is no run."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import run_record, seeded_masks
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.runs.run_dir import RECIPE, RunDir
from megatron_spdf.sparsity.plan import Plan


@pytest.fixture
def claimed(recipe):
    """The directory of a run that has begun."""
    run = RunDir(recipe(sparsity=0.75))
    run.check()
    run.create()
    return run


@pytest.fixture
def saved(recipe):
    """A run with a checkpoint of step 4, as far as files tell."""
    run = RunDir(recipe())
    run.create()
    partial = run.checkpoints / f"step_00000004{store.PARTIAL}"
    partial.mkdir(parents=True)
    record = run_record(run.recipe, Plan.of(run.recipe), SimpleNamespace(kind="x", sha256="0"),
                        seeded_masks(Plan.of(run.recipe)), "there", {"step": 4, "tokens": 9}, {})
    (partial / store.RUN).write_text(json.dumps(record))
    (partial / "common.pt").write_bytes(b"123")
    store.complete(partial, {name: store.describe(partial / name)
                             for name in (store.RUN, "common.pt")})
    return run


@pytest.mark.parametrize(("harm", "said"), [
    (lambda there: there.rename(there.with_name("step_00000008")),
     "step_00000008 is the name of another step's checkpoint; if it was renamed, call it step_0+4"),
    (lambda there: (there / "common.pt").write_bytes(b"12"), "has 2 bytes instead of 3"),
    (lambda there: (there / store.FILES).unlink(), "cannot be read"),
])
def test_a_checkpoint_that_no_run_goes_on_from_is_refused_before_the_ranks(saved, harm, said):
    saved.preflight()
    harm(saved.checkpoints / "step_00000004")
    saved.check()
    before = (saved.root / "starts.json").read_text()
    with pytest.raises(ValueError, match=said):
        saved.preflight()
    assert (saved.root / "starts.json").read_text() == before  # it was no start


def test_new_directory_is_accepted_and_not_yet_made(recipe):
    run = RunDir(recipe())
    run.check()
    assert not run.root.exists()


def test_empty_directory_is_accepted(recipe):
    run = RunDir(recipe())
    run.root.mkdir()
    run.check()


def test_recipe_is_kept_in_the_directory(claimed):
    assert load_recipe(claimed.root / RECIPE) == claimed.recipe


def test_same_recipe_goes_on(claimed, recipe):
    RunDir(recipe(sparsity=0.75)).check()


def test_claiming_again_is_harmless(claimed):
    claimed.create()
    claimed.check()


@pytest.mark.parametrize("name", ["checkpoints", "log.jsonl", "tensorboard"])
def test_a_run_that_another_user_began_is_refused_before_it_goes_on(
        claimed, recipe, monkeypatch, name):
    path = claimed.root / name
    path.touch() if path.suffix else path.mkdir(exist_ok=True)
    RunDir(recipe(sparsity=0.75)).check()
    monkeypatch.setattr(os, "access", lambda there, mode: there != path)
    with pytest.raises(ValueError, match=f"{name} is read-only for this user.*chmod"):
        RunDir(recipe(sparsity=0.75)).check()


@pytest.mark.parametrize("change", [
    {"parallel": {"tensor": 2, "data": 2, "zero_stage": 0}},
    {"log": {"every": 1, "tensorboard": False}}, {"checkpoint": {"every": 3}},
    {"evaluate": {"every": 5}}, {"kernels": {"norm": "torch"}},
    {"fault_tolerance": {"max_skipped": 1}}, {"train": {"micro_batch": 1, "recompute": "full"}},
    {"data": {"workers": 0, "index_cache": "elsewhere", "tokenizer": "elsewhere"}}])
def test_layout_logging_and_the_like_may_change(claimed, recipe, change):
    RunDir(recipe(sparsity=0.75, **change)).check()


@pytest.mark.parametrize("change, key, before, now", [
    ({"seed": 9}, "seed", "1234", "9"),
    ({"sparsity": 0.5}, "sparsity.level", "0.75", "0.5"),
    ({"sparsity": {"level": 0.75, "seed": 3}}, "sparsity.seed", "0", "3"),
    ({"model": {"layers": 2}}, "model.layers", "4", "2"),
    ({"model": {"dropout": 0.1}}, "model.dropout", "0.0", "0.1"),
    ({"optimizer": {"lr": 0.002}}, "optimizer.lr", "0.001", "0.002"),
    ({"optimizer": {"beta2": 0.95}}, "optimizer.beta2", "0.999", "0.95"),
    ({"train": {"global_batch": 4}}, "train.global_batch", "8", "4"),
    ({"train": {"tokens": 5120}}, "train.tokens", "2560", "5120"),
    ({"train": {"sequence_length": 16}}, "train.sequence_length", "32", "16"),
    ({"train": {"precision": "fp32"}}, "train.precision", "bf16", "fp32"),
    ({"data": {"train": "other"}}, "data.train", r"\[\]", r"\['other'\]"),
])
def test_run_of_another_recipe_is_refused_with_both_values(claimed, recipe, change, key, before,
                                                           now):
    with pytest.raises(ValueError, match=f"{key} is {before} there and {now} here") as caught:
        RunDir(recipe(**{"sparsity": 0.75, **change})).check()
    assert str(claimed.root) in str(caught.value) and "Choose another output" in str(caught.value)


@pytest.mark.parametrize("change, longer, allowed", [
    ({}, 5120, True), ({}, 1280, False), ({"optimizer": {"decay": "cosine"}}, 5120, False),
    ({"optimizer": {"decay": "linear"}}, 5120, False),
    ({"sparsity": {"level": 0.75, "algorithm": "set", "update": {"every": 2}}}, 5120, False),
    ({"stages": [{"share": 0.5, "sparsity": level} for level in (0.75, 0.0)]}, 5120, False)])
def test_a_run_is_lengthened_where_no_step_depends_on_its_length(recipe, change, longer, allowed):
    sections = {"optimizer": {"decay": "constant"}, **change}
    run = RunDir(recipe(**sections, train={"tokens": 2560}))
    run.check()
    run.create()
    grown = RunDir(recipe(**sections, train={"tokens": longer}))
    if allowed:
        grown.check()
        return
    with pytest.raises(ValueError, match="tokens is 2560 there.*it can be lengthened where"):
        grown.check()


def test_every_difference_is_named(claimed, recipe):
    with pytest.raises(ValueError) as caught:
        RunDir(recipe(sparsity=0.5, seed=9, optimizer={"lr": 0.002})).check()
    for key in ("sparsity.level", "seed", "optimizer.lr"):
        assert f"{key} is " in str(caught.value)


def test_directory_of_something_else_is_refused(recipe):
    run = RunDir(recipe())
    run.root.mkdir()
    (run.root / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a run directory.*choose another output"):
        run.check()


def test_file_in_the_place_of_the_directory_is_refused(recipe):
    run = RunDir(recipe())
    run.root.touch()
    with pytest.raises(ValueError, match="is a file; choose another output"):
        run.check()


@pytest.mark.parametrize("content", ["a: b: c", "- 1\n", "output: x\n", "", "\x00"],
                         ids=["not YAML", "list", "incomplete", "empty", "control character"])
def test_damaged_recipe_is_refused(claimed, content):
    (claimed.root / RECIPE).write_text(content)
    with pytest.raises(ValueError,
                       match=r"(?s)recipe\.yaml cannot be read as a recipe.*choose another output"):
        claimed.check()


def test_everything_a_run_writes_is_inside_its_directory(recipe):
    run = RunDir(recipe())
    assert all(path.is_relative_to(run.root)
               for path in (run.checkpoints, run.log, run.tensorboard, run.cache))


def test_cache_may_be_elsewhere(recipe, tmp_path):
    assert RunDir(recipe(data={"index_cache": str(tmp_path / "cache")})).cache == tmp_path / "cache"


VALID, OTHER = {"data.valid": "a" * 64}, {"data.valid": "b" * 64}


@pytest.mark.parametrize("there, here, now, said", [
    (VALID, VALID, "/moved/valid", ""),  # the same data at another place, or by another name
    (VALID, OTHER, "/moved/valid", r"data.valid is \['valid'\] there and \['/moved/valid'\] here"),
    (VALID, OTHER, "valid", "data.valid has another content than at the last start"),
    (VALID, VALID, "valid", ""),
    ({}, VALID, "/moved/valid", "data.valid is "), ({}, VALID, "valid", ""),
])
def test_data_are_compared_by_their_content_where_that_is_known(recipe, there, here, now, said):
    RunDir(recipe(data={"valid": "valid"}), there).create()
    again = RunDir(recipe(data={"valid": now}), here)
    if not said:
        again.check()
        return
    with pytest.raises(ValueError, match=said):
        again.check()


def test_a_start_that_has_changed_since_is_no_other_run(recipe):
    """A run that is fine-tuned from may go on training."""
    from megatron_spdf.recipe.finetune import Finetune

    def tuned(checkpoint: str) -> Finetune:
        return Finetune(checkpoint=checkpoint, output=recipe().output,
                        data={"task": "e2e", "path": "e2e"}, optimizer={"lr": 1e-4},
                        train={"global_batch": 8, "micro_batch": 8})

    RunDir(tuned("start"), {"checkpoint": "1", "data.path": "1"}).create()
    RunDir(tuned("start"), {"checkpoint": "2", "data.path": "1"}).check()
    RunDir(tuned("/moved/start"), {"checkpoint": "1", "data.path": "1"}).check()
    with pytest.raises(ValueError, match="checkpoint is start there and /moved/start here"):
        RunDir(tuned("/moved/start"), {"checkpoint": "2", "data.path": "1"}).check()


@pytest.mark.parametrize(("key", "refused"), [("data.train", False), ("data.blend", False),
                                              ("data.valid", True), ("checkpoint", False)])
def test_training_data_of_another_content_go_on_where_the_recipe_says_so(recipe, key, refused):
    """A run goes on as it began, whatever the checkpoint that it started from has become."""
    RunDir(recipe(), {key: "a"}).create()
    RunDir(recipe(), {key: "a"}).check()
    go_on = RunDir(recipe(data={"on_blend_change": "continue"}), {key: "b"})
    stay = RunDir(recipe(), {key: "b"})
    for run, fails in ((go_on, refused), (stay, key != "checkpoint")):
        if fails:
            with pytest.raises(ValueError, match=f"{key} has another content than at the last"):
                run.check()
        else:
            run.check()
