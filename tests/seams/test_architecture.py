"""An architecture that lies outside the package, toy_decoder.py, works wherever GPT does."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from curves import close
from harness import outcome, run_cases
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
CHAIN = ["tp2 sp", "pp2", "deepspeed zero 3", "dp2"]
PLANNED = {"one": (1, {}), **{name: (2, LAYOUTS[name])
                              for name in ("tp2", "tp2 sp", "pp2", "pp2 interleaved", "dp2")}}
TOLERANCE = 1e-4  # of logits with a spread near 1: some hundred roundings of fp32
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
def results(make, place):
    def train(*changes: dict) -> tuple[str, dict]:
        sections = {key: value for change in changes for key, value in change.items()}
        return "architecture_cases.train", {"recipe": make(**sections), "steps": STEPS}

    def converted(name: str, stop: int, **sections) -> tuple[str, dict]:
        return "architecture_cases.converted", {
            "recipe": make(str(place / name), **sections), "stop": stop, "ids": IDS}

    one = {kind: train(change) for kind, change in KINDS.items()}
    one |= {kind + " saved": converted(kind, 2, **change) for kind, change in KINDS.items()}
    two = {f"{kind} {layout}": train(KINDS[kind], LAYOUTS[layout]) for kind, layout in RUNS}
    two["chain"] = ("architecture_cases.cut", {
        "recipes": [make(str(place / "chain"), **LAYOUTS[layout]) for layout in CHAIN],
        "stops": [1, 3, 4, STEPS]})
    two |= {f"{kind} imported": converted(f"{kind} from hf", 1, **change, **LAYOUTS["tp2"])
            for kind, change in KINDS.items() if kind != "75%"}
    groups = {1: one, 2: two}
    for name, (world, sections) in PLANNED.items():
        groups[world]["planned " + name] = ("architecture_cases.planned",
                                            {"recipe": planned_recipe(make, sections)})
    one["kept"] = ("architecture_cases.kept_by_layer", {"recipe": make()})
    return {world: run_cases(world, cases, place / str(world), timeout=1800)
            for world, cases in groups.items()}


def planned_recipe(make, sections: dict) -> dict:
    """With activations above the small change of a step."""
    train = {**sections.get("train", {}), "micro_batch": 1}
    return make(**{**sections, "train": train, "model": {"hidden": 128}})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_losses_are_the_same_at_every_layout_and_on_both_engines(results, kind, layout):
    reference, there = outcome(results[1], kind), outcome(results[2], f"{kind} {layout}")
    close(there["curve"], reference["curve"])
    assert there["valid"] == pytest.approx(reference["valid"], rel=1e-5)
    assert there["sparsity"] == pytest.approx(there["planned"], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_in_its_own_way(results, kind):
    curve = outcome(results[1], kind)["curve"]
    assert curve[-1][0] < curve[0][0]
    others = [outcome(results[1], other)["curve"] for other in KINDS if other != kind]
    assert all(abs(curve[0][1] - other[0][1]) > 0.1 for other in others)  # gradient norms


@pytest.mark.slow
def test_a_run_goes_on_at_other_layouts_and_on_the_other_engine(results):
    close(outcome(results[2], "chain"), outcome(results[1], "75%")["curve"])


def exported(results, place: Path, kind: str) -> Path:
    """The saved run of a kind as a directory of transformers."""
    directory = place / f"{kind} exported"
    if not directory.exists():
        outcome(results[1], f"{kind} saved")
        export(CheckpointReader(find_checkpoint(place / f"{kind}")), directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(results, place, kind):
    """Also under mup, whose multipliers are folded into the weights."""
    ours = outcome(results[1], f"{kind} saved")["after"]
    theirs = logits_of(exported(results, place, kind), IDS)
    assert float(theirs.std()) > 0.1
    assert float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "mup"])
def test_a_run_from_transformers_computes_the_same(results, place, make, kind):
    source = open_weights(exported(results, place, kind))
    assert isinstance(source.model, Toy) and source.model.rotary_base == 500.0
    write_initial_checkpoint(source, Recipe.model_validate(make(**KINDS[kind])), source.tokenizer,
                             place / f"{kind} from hf")
    before = [outcome(results[2], f"{kind} imported", rank)["before"] for rank in range(2)]
    assert torch.equal(*before)
    assert float((before[0] - outcome(results[1], f"{kind} saved")["after"]).abs().max()) < (
        TOLERANCE)


@pytest.mark.slow
def test_weights_come_back_from_both_formats_as_they_went(results, place):
    directory = exported(results, place, "75%")
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
def test_the_planner_knows_its_bytes_and_traffic(results, name):
    world, _ = PLANNED[name]
    for rank in range(world):
        there = outcome(results[world], "planned " + name, rank)
        assert there["held"] == there["predicted"]
        assert there["sent"] == there["predicted to be sent"]


@pytest.mark.slow
def test_a_layer_keeps_what_the_closed_form_says(results, make):
    """To the byte. PyTorch's RMSNorm has one function on a GPU; on CPU it keeps its output before
    the product with the weight, too."""
    recipe = Recipe.model_validate(make())
    kept = sum(layer_bytes(recipe).values())
    assert outcome(results[1], "kept") == kept + 2 * sizes_of(recipe).hidden


# As of GPT in tests/distributed/test_planning.py; pipeline stages receive ahead of use.
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_the_planner_knows_its_activations(results, make, name):
    world, sections = PLANNED[name]
    recipe = Recipe.model_validate(planned_recipe(make, sections))
    p = recipe.parallel
    for rank in range(world):
        there = outcome(results[world], "planned " + name, rank)
        layers = (in_flight(recipe, rank * (p.pipeline > 1))
                  * recipe.model.layers // p.pipeline // p.interleave)
        on_cpu = layers * 2 * sizes_of(recipe).hidden  # of its RMSNorm
        assert there["predicted to be alive"] == pytest.approx(there["alive"], rel=0.1,
                                                               abs=on_cpu), rank


@pytest.mark.slow
def test_every_kind_of_rank_is_as_predicted(make, monkeypatch):
    monkeypatch.setenv("SPDF_PLUGINS", "toy_decoder")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    layouts = [{}, {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2},
               {"pipeline": 2, "interleave": 2, "data": 4, "zero_stage": 0}]
    recipes = [Recipe.model_validate(make(parallel=layout, train={
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
    values = make()
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


run = partial(run_with, plugins="toy_decoder")


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
