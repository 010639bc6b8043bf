"""What a fine-tuning run hands from its start, its recipe and its data to each of its parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_spdf.checkpoint.reader import CheckpointReader
from megatron_spdf.data.finetuning.completions import Completions
from megatron_spdf.recipe.finetune import Finetune, training_recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.sparsity.settings import Sparsity
from megatron_spdf.training import finetune_setup
from megatron_spdf.training.finetune_setup import check_rules, prepare

MOVED = {"kind": "moved", "how": "random, seed 3", "algorithm": "set", "updates": 4}


class Start(CheckpointReader):
    """A checkpoint without files."""

    origin = "step 9 of the run r"

    def __init__(self, recipe):
        self.path, self.recipe, self.model, self.plan = "there", recipe, recipe.model, Plan.of(
            recipe)
        self.master, self.mask_bits, self.held_bits, self.masks = "master", "bits", "held", MOVED


def pairs(count: int, length: int) -> Completions:
    return Completions([np.arange(length + number % 3, dtype=np.int32) for number in range(count)],
                       np.full(count, 2), truncated=0)


@pytest.fixture
def begin(recipe, monkeypatch):
    """A fine-tuning recipe, its start, and notes of what is asked for; 100 training pairs."""
    def begin(**changes):
        start = Start(recipe(model={"max_positions": 40}, sparsity={
            "level": 0.75, "algorithm": "set", "seed": 3}))
        finetune = Finetune.model_validate({
            "checkpoint": "there", "output": "tuned", "seed": 31, "engine": "megatron",
            "data": {"task": "e2e", "path": "data", "too_long": "leave_out"},
            "train": {"epochs": 2, "global_batch": 8, "micro_batch": 4},
            "optimizer": {"lr": 1e-3}, **changes})
        asked, tokenizer = [], SimpleNamespace(eod=299)
        teacher = SimpleNamespace(contents={"distill.teacher": "hash of it"}, summary="taught by")

        def note(name: str, gives=None):
            monkeypatch.setattr(finetune_setup, name, lambda *parts: (
                asked.append((name, *parts)) or gives))
        for name, gives in (("require_splits", None), ("tokenizer_of", tokenizer),
                            ("require_sound", None), ("check_tensor", None),
                            ("Teacher", teacher), ("_summary", "summary"),
                            ("fingerprint", "hash"), ("count_pairs", 100), ("require_fit", None)):
            note(name, gives)
        data = {"train": pairs(100, 6), "validation": pairs(9, 7)}
        monkeypatch.setattr(finetune_setup, "tokenize", lambda *parts: (
            asked.append(("tokenize", *parts)) or data[parts[2]]))
        return finetune, start, tokenizer, data, teacher, asked
    return begin


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize(("length", "window"), [(24, 24), (None, 40)])
def test_a_start_is_checked_against_recipe_and_data_and_handed_on(begin, mode, length, window):
    batches = {"epochs": 2, "global_batch": 8, "micro_batch": 4, "sequence_length": length}
    finetune, start, tokenizer, data, teacher, asked = begin(mode=mode, train=batches)
    kept = Sparsity(level=0.75, seed=3) if mode == "sparse" else Sparsity()
    made = training_recipe(finetune, start.model, kept, 100)
    found, path = prepare(finetune, start), Path("data")
    plan = found.plan
    assert [*plan.weights.values()] == [*Plan.of(made).weights.values()]
    assert bool(plan.weights) == (mode == "sparse")
    assert asked == [
        ("require_splits", "e2e", path), ("tokenizer_of", start),
        ("tokenize", "e2e", path, "train", tokenizer, window, "leave_out"),
        ("tokenize", "e2e", path, "validation", tokenizer, window, "leave_out"),
        ("check_tensor", plan, 1), ("require_sound", start), ("Teacher", made, tokenizer),
        ("_summary", finetune, start, made, plan, tokenizer, data["train"], data["validation"])]
    assert (found.recipe, found.tokenizer, found.teacher) == (made, tokenizer, teacher)
    assert (found.train, found.valid) == (data["train"], data["validation"])
    assert found.origin == f"{mode} fine-tuning from step 9 of the run r"
    assert found.masks == (MOVED if mode == "sparse" else {
        "kind": "seeded", "how": "random, seed 0", "algorithm": "static", "updates": 0})
    assert found.summary == "summary\ntaught by"
    assert found.contents == {
        "data.path": f"{data['train'].sha256} {data['validation'].sha256}", "checkpoint": "hash",
        "distill.teacher": "hash of it"}
    assert asked[-1] == ("fingerprint", start)


@pytest.mark.parametrize(("changes", "masks", "revived", "held"), [
    ({}, None, 0.0, None), ({"revived_scale": 0.5}, None, 0.0, None),
    ({"revived": "normal"}, None, 1.0, None),
    ({"revived": "normal", "revived_scale": 0.5}, None, 0.5, None),
    ({"mode": "sparse"}, "bits", 0.0, "held")], ids=str)
def test_weights_are_those_of_the_start_and_revived_ones_have_the_runs_seed(begin, changes, masks,
                                                                           revived, held):
    from megatron_spdf.model.init import LoadedWeights

    finetune, start, *_ = begin(**changes)
    assert prepare(finetune, start).make_weights() == LoadedWeights(
        read="master", read_mask=masks, revived=revived, seed=31, slices=4, read_held=held)


def test_batches_are_of_the_runs_data_and_of_the_engines_replica(begin, monkeypatch):
    finetune, start, tokenizer, data, *_ = begin()
    monkeypatch.setattr(finetune_setup, "CompletionData", lambda *parts: parts)
    engine = SimpleNamespace(data_parallel_rank=3)
    assert prepare(finetune, start).make_data("recipe", engine) == (
        "recipe", data["train"], data["validation"], tokenizer.eod, 3)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_rules_of_many_runs_are_checked_without_their_tokens(begin, mode):
    finetune, start, tokenizer, *_, asked = begin(mode=mode, parallel={"tensor": 2})
    check_rules(finetune, start)
    kept = Sparsity(level=0.75, seed=3) if mode == "sparse" else Sparsity()
    made = training_recipe(finetune, start.model, kept, 100)
    counted, tensor, *rest = asked
    assert counted == ("count_pairs", "e2e", "data") and tensor[::2] == ("check_tensor", 2)
    assert [*tensor[1].weights.values()] == [*Plan.of(made).weights.values()]
    assert rest == [("tokenizer_of", start), ("Teacher", made, tokenizer), *(
        ("require_fit", "e2e", Path("data"), split, tokenizer, 40, "leave_out")
        for split in ("train", "validation"))]


def test_a_dense_start_has_no_mask_to_keep(begin, recipe):
    finetune, *_ = begin(mode="sparse")
    with pytest.raises(ValueError, match="mode=sparse keeps the mask .*checkpoint=there has none"):
        check_rules(finetune, Start(recipe()))
