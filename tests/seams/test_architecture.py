"""An architecture that lies outside the package, toy_decoder.py, works wherever GPT does."""

from __future__ import annotations

import json
import os
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml
from architecture_cases import kept_by_layer
from cases import converted, cut, planned, train
from curves import close, close_runs
from harness import world_of
from mup import MUP
from toy_decoder import Toy
from user_command import run_with

from megatron_spdf.architecture.base import HEAD
from megatron_spdf.checkpoint.inspect import describe, verify
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.huggingface_export import export
from megatron_spdf.convert.initial_checkpoint import write_initial_checkpoint
from megatron_spdf.convert.megatron_lm import MegatronReader, arguments, save_for_megatron
from megatron_spdf.convert.source import open_weights
from megatron_spdf.evaluation.subspace import distances
from megatron_spdf.planning.activations import in_flight, layer_bytes, sizes_of
from megatron_spdf.planning.exact import dry_runs, ranks_of_interest
from megatron_spdf.recipe.help import render_help
from megatron_spdf.recipe.load import make_recipe as load
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.schedule.flops import forward_flops
from megatron_spdf.sparsity.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1]))
from huggingface_models import logits_of  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOY = {"architecture": "toy", "layers": 4, "query_groups": 2, "ffn_hidden": 96, "init_std": 0.1,
       "rotary_base": 500.0, "norm_eps": 1e-5}
STEPS = 6
LAYOUTS = {
    "tp2": {"parallel": {"tensor": 2}},
    "tp2 sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}, "train": {"micro_batch": 2}},
    "dp2": {"parallel": {"data": 2}},
    "tp2 sp recomputed": {"parallel": {"tensor": 2, "sequence": True},
                          "train": {"recompute": "full"}},
    "deepspeed tp2 sp": {"engine": "deepspeed", "parallel": {"tensor": 2, "sequence": True}},
    "deepspeed zero 2": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 2}},
    "deepspeed zero 3": {"engine": "deepspeed", "parallel": {"data": 2, "zero_stage": 3}},
}
KINDS = {"dense": {"sparsity": 0.0}, "75%": {}, "mup": MUP}
OF_MUP = ["tp2 sp", "deepspeed zero 2"]
RUNS = [(kind, layout) for kind in KINDS for layout in LAYOUTS
        if kind != "mup" or layout in OF_MUP]
PLANNED = {"one": {}, **{name: LAYOUTS[name]
                         for name in ("tp2", "tp2 sp", "pp2", "pp2 interleaved", "dp2")}}
TOLERANCE = 1e-4  # of logits with a spread near 1: some hundred roundings of fp32
PLUGINS = "toy_decoder"  # of the ranks
IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def make(make_recipe):
    """A small recipe of the toy, with sections changed by keyword."""
    def make_toy(output: str | None = None, **sections) -> dict:
        return make_recipe(output, **{**sections, "model": TOY | sections.get("model", {})})
    return make_toy


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def trained(ranks, make):
    """What rank 0 gives of a run of a kind at a layout."""
    def run(kind: str, layout: dict | None = None) -> dict:
        recipe = make(**KINDS[kind], **(layout or {}))
        return ranks(world_of(recipe)).run(train, recipe, steps=STEPS)
    return run


@pytest.fixture(scope="module")
def saved(ranks, make, place):
    """Logits of a run of a kind, whose checkpoint is there then."""
    def run(kind: str) -> torch.Tensor:
        return ranks(1).run(converted, make(str(place / kind), **KINDS[kind]), 2, IDS)["after"]
    return run


@pytest.fixture(scope="module")
def exported(saved, place):
    """The saved run of a kind as a directory of transformers."""
    @cache
    def export_run(kind: str) -> Path:
        saved(kind)
        export(CheckpointReader(find_checkpoint(place / kind)), place / f"{kind} exported")
        return place / f"{kind} exported"
    return export_run


@pytest.fixture(scope="module")
def step(ranks, make):
    """A recipe with activations above the small change of a step, and what is counted and predicted
    of a step on each rank."""
    def of(name: str) -> tuple[Recipe, list[dict]]:
        train = {**PLANNED[name].get("train", {}), "micro_batch": 1}
        recipe = make(**{**PLANNED[name], "train": train, "model": {"hidden": 128}})
        there = ranks(world_of(recipe)).run_all(planned, recipe)
        return Recipe.model_validate(recipe | {"output": "none"}), there
    return of


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_losses_are_the_same_at_every_layout_and_on_both_engines(trained, kind, layout):
    there = trained(kind, LAYOUTS[layout])
    close_runs(there, trained(kind))
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_in_its_own_way(trained, kind):
    curve = trained(kind)["curve"]
    assert curve[-1][0] < curve[0][0]
    for other in (trained(other)["curve"] for other in KINDS if other != kind):
        # loss or gradient norm of the first step
        assert max(abs(a - b) for a, b in zip(curve[0], other[0], strict=True)) > 0.1


@pytest.mark.slow
def test_a_run_goes_on_at_other_layouts_and_on_the_other_engine(ranks, make, trained):
    chain = [make(**LAYOUTS[layout]) for layout in ("tp2 sp", "pp2", "deepspeed zero 3", "dp2")]
    close(ranks(2).run(cut, chain, [1, 3, 4, STEPS]), trained("75%")["curve"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(saved, exported, kind):
    """Also under mup, whose multipliers are folded into the weights."""
    ours, theirs = saved(kind), logits_of(exported(kind), IDS)
    assert float(theirs.std()) > 0.1
    assert float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mup"])
def test_a_run_from_transformers_computes_the_same(ranks, make, saved, exported, tmp_path, kind):
    source, run = open_weights(exported(kind)), str(tmp_path / "run")
    assert isinstance(source.model, Toy) and source.model.rotary_base == 500.0
    write_initial_checkpoint(source, Recipe.model_validate(make(run, **KINDS[kind])),
                             source.tokenizer, Path(run))
    recipe = make(run, **KINDS[kind], **LAYOUTS["tp2"])
    before = [there["before"] for there in ranks(2).run_all(converted, recipe, 1, IDS)]
    assert torch.equal(*before)
    assert float((before[0] - saved(kind)).abs().max()) < TOLERANCE


@pytest.mark.slow
def test_weights_come_back_from_both_formats_as_they_went(exported, place):
    directory = exported("75%")
    reader = CheckpointReader(find_checkpoint(place / "75%"))
    assert "are there" in verify(reader) and describe(reader)["model"]["architecture"] == "toy"
    save_for_megatron(reader, place / "megatron", torch.float32)
    for back in (open_weights(directory), MegatronReader(place / "megatron", reader.model)):
        assert not back.model.differences(reader.model)
        for name, weight in reader.weights.items():
            rows = 300 if weight.shape[0] == reader.model.padded_vocab else None
            assert torch.equal(back.weight(name)[:rows], reader.weight(name)[:rows]), name
    words = arguments(reader)
    for word in ("--swiglu", "--normalization RMSNorm", "--disable-bias-linear",
                 "--position-embedding-type rope", "--rotary-base 500",
                 "--untie-embeddings-and-output-weights"):
        assert word in words
    (moved, *_) = distances(reader, open_weights(directory))
    assert list(moved) == ["W_Q", "W_K", "W_V", "W_D", "W_I gate", "W_I up", "W_O"]
    assert set(moved.values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_planner_knows_its_bytes_and_traffic(step, name):
    for there in step(name)[1]:
        assert there["held"] == there["predicted"]
        assert there["sent"] == there["predicted to be sent"]


@pytest.mark.slow
def test_a_layer_keeps_what_the_closed_form_says(ranks, make):
    """To the byte. PyTorch's RMSNorm has one function on a GPU; on CPU it keeps its output before
    the product with the weight, too."""
    recipe = Recipe.model_validate(make("none"))
    kept = sum(layer_bytes(recipe).values())
    assert ranks(1).run(kept_by_layer, make()) == kept + 2 * sizes_of(recipe).hidden


# As of GPT in tests/distributed/test_planning.py; pipeline stages receive ahead of use.
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_planner_knows_its_activations(step, name):
    recipe, ranks = step(name)
    p = recipe.parallel
    for rank, there in enumerate(ranks):
        layers = (in_flight(recipe, rank * (p.pipeline > 1))
                  * recipe.model.layers // p.pipeline // p.interleave)
        on_cpu = layers * 2 * sizes_of(recipe).hidden  # of its RMSNorm
        assert there["predicted to be alive"] == pytest.approx(there["alive"], rel=0.1,
                                                               abs=on_cpu), rank


@pytest.mark.slow
def test_every_kind_of_rank_is_as_predicted(make, monkeypatch):
    monkeypatch.setenv("SPDF_PLUGINS", PLUGINS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    layouts = [{}, {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2},
               {"pipeline": 2, "interleave": 2, "data": 4, "zero_stage": 0}]
    recipes = [Recipe.model_validate(make("none", parallel=layout, train={
        "precision": precision, "micro_batch": 1})) for layout in layouts
        for precision in ("fp32", "bf16")]
    for counts in dry_runs([(r, Plan.of(r), ranks_of_interest(r)) for r in recipes]):
        assert all(count.agrees for count in counts), counts


def test_its_weights_and_costs():
    """The shape of TinyLlama-1.1B, whose published count is 1,100,048,384; FLOPs by hand."""
    model = Toy(layers=22, hidden=2048, heads=32, query_groups=4, ffn_hidden=5632,
                vocab_size=32000)
    weights = {w.name: w for w in model.weights()}
    assert sum(w.numel for w in weights.values()) == 1_100_048_384
    assert weights[HEAD].layer == 22 and not weights[HEAD].linear
    assert not any(name.endswith(".bias") or "position" in name for name in weights)
    layer = 2048 * (2048 + 2 * 4 * 64) + 2048 * 2048 + 3 * 2048 * 5632
    found = forward_flops(model, 2048)
    assert found.linear == 2 * 22 * layer and found.logits == 2 * 32000 * 2048
    assert found.attention == 4 * 22 * 2048 * 2048


def test_its_section_of_a_recipe(make):
    values = make("none")
    loaded = load(values, ["model.rotary_base=1e4"], "recipe.yaml")
    assert isinstance(loaded.model, Toy) and loaded.model.rotary_base == 1e4
    assert Recipe.model_validate(loaded.model_dump()) == loaded
    assert not list(rule_violations(loaded))
    for words, said in [
        (["model.architecture=tay"], "there is no architecture 'tay'; known: toy"),
        (["model.rotary_bas=1"], "did you mean model.rotary_base?"),
        (["model.preset=gpt2_small"], "unknown key model.preset"),
        (["model.norm_eps=0"], "model.norm_eps=0: input should be greater than 0"),
        (["data.reset_positions=true"], "data.reset_positions=true"),
    ]:
        with pytest.raises(ValueError, match=said.replace("?", r"\?")):
            load(values, words, "recipe.yaml")
    assert "model, architecture=toy:  A toy decoder" in render_help()
    assert "model.rotary_base" in render_help() and "model.norm_eps" in render_help()
    gpt = load(values, ["model.architecture=gpt"], "recipe.yaml")  # its keys go with it
    assert gpt.model.architecture == "gpt" and not hasattr(gpt.model, "rotary_base")


run = partial(run_with, plugins=PLUGINS)


@pytest.mark.slow
def test_it_is_planned_and_trained_from_the_command_line(make, tmp_path):
    values = make(str(tmp_path / "run"), log={"every": 1}, checkpoint={"every": 3})
    values["train"] |= {"tokens": 8 * 32 * 5}
    values["optimizer"] |= {"warmup_tokens": 256}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode == 2
    assert "there is no architecture 'toy'; known: gpt" in refused.stderr
    assert not (tmp_path / "run").exists()
    planned = run(tmp_path, "tools/plan.py", "recipe.yaml", "--gpus", "1", "--gpu", "a100",
                  "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["own_layout"]["fits"]
    done = run(tmp_path, "pretrain.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "RMSNorm" in done.stdout
    shown = run(tmp_path, "tools/inspect_checkpoint.py", "run", "--json")
    assert shown.returncode == 0 and json.loads(shown.stdout)["model"]["architecture"] == "toy"
