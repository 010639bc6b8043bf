"""The recipe of a run that goes on from a model of Hugging Face: what a user gives, what the model
says, and what suits continued training, in this order."""

from __future__ import annotations

import pytest
import torch
import yaml
from small_models import MODEL, gpt2_tensors, make_recipe, write_gpt2

from megatron_spdf.convert.continued import recipe_for
from megatron_spdf.convert.huggingface_import import HuggingFaceReader


@pytest.mark.parametrize(("kinds", "precision"), [
    ([torch.bfloat16], "bf16"), ([torch.float32], "fp32"), ([torch.float16], "fp32"),
    ([torch.bfloat16, torch.float32], "fp32")])
def test_without_a_recipe_a_run_goes_on_in_the_precision_of_the_files(tmp_path, kinds, precision):
    tensors = {name: tensor.to(kinds[i % len(kinds)])
               for i, (name, tensor) in enumerate(gpt2_tensors().items())}
    source = HuggingFaceReader(write_gpt2(tmp_path / "model", tensors))
    recipe = recipe_for(source, None, ["output=out", "train.sequence_length=10"])
    assert recipe.train.precision == precision and recipe.output == "out"
    assert (recipe.train.tokens, recipe.train.global_batch, recipe.train.micro_batch) == (
        10**9, 64, 1)
    assert (recipe.optimizer.lr, recipe.optimizer.warmup_tokens) == (2e-5, 10**7)
    assert recipe.sparsity.level == 0.0 and recipe.model == source.model
    words = ["output=out", "train.precision=fp32", "train.tokens=2K", "optimizer.lr=1e-4",
             "sparsity=0.5", "optimizer.warmup_tokens=0"]
    own = recipe_for(source, None, words)
    assert (own.train.precision, own.train.tokens, own.optimizer.lr, own.sparsity.level) == (
        "fp32", 2000, 1e-4, 0.5)


def test_a_recipe_is_taken_with_the_model_where_it_says_nothing_of_it(gpt2, tmp_path):
    source, path = HuggingFaceReader(gpt2), tmp_path / "recipe.yaml"
    values = make_recipe(train={"precision": "fp32"}, seed=5).model_dump()
    for given, dropout in (({}, 0.0), ({"dropout": 0.1}, 0.1)):
        path.write_text(yaml.safe_dump({**values, "model": given}))
        recipe = recipe_for(source, path, ["output=out", "optimizer.lr=1e-5"])
        assert {key: getattr(recipe.model, key) for key in MODEL} == MODEL
        assert recipe.model.dropout == dropout
        assert (recipe.train.tokens, recipe.train.global_batch, recipe.seed) == (1000, 4, 5)
        assert recipe.optimizer.lr == 1e-5
    path.write_text(yaml.safe_dump({**values, "model": {"layers": 3}}))  # which is compared later
    assert recipe_for(source, path, []).model.layers == 3
