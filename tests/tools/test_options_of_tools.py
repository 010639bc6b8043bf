"""Every option of a tool reaches what does the work, as what it says; and each has a row here.

What does the work is replaced by what keeps its arguments.
"""

from __future__ import annotations

import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import experiment
import law_page
import plan
import preprocess_data
import pytest
import report
import torch
import yaml

from megatron_spdf.convert.calibration import Calibration
from megatron_spdf.planning.exact import ranks_of_interest
from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.planning.overview import Request
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Parallel
from megatron_spdf.runs.law_points import Training
from megatron_spdf.scaling_law.forms import FORMS
from megatron_spdf.scaling_law.law import PUBLISHED
from megatron_spdf.scaling_law.points import Point
from megatron_spdf.sparsity.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs/pretrain/demo.yaml")


def parts_of(plan: Plan) -> list[tuple[str, float, int]]:
    """By which plans are compared."""
    return [(weight.name, weight.level, weight.active) for weight in plan.weights.values()]


@pytest.fixture
def keep(monkeypatch):
    """Replaces a name of a module; returns the list of (arguments, keywords) that it is called
    with from then on."""
    def keep(module, name: str, answer=None) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []
        monkeypatch.setattr(module, name, lambda *given, **named: (
            calls.append((given, named)), answer)[1])
        return calls
    return keep


@pytest.fixture
def every(capsys):
    """Requires that words have all options of a command."""
    def every(main, command: list[str], *runs: list[str]) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        usage = capsys.readouterr().out.partition("\n\n")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage)) - {"--help"}
        assert options <= {word.partition("=")[0] for words in runs for word in words}, options
    return every


def test_what_is_planned_is_what_is_asked_for(keep, every, monkeypatch, tmp_path, capsys):
    overviews, pages = keep(plan, "make_overview", {"facts": 1}), keep(plan, "render_plan_page", "")
    rendered = keep(plan, "_rendered", "said")
    words = ["--gpu", "h100", "--gpus", "6", "--price", "2.5", "--memory", "40", "--network", "7",
             "--gpus-per-node", "3", "--efficiency", "0.3", "--top", "5", "--json", "--html",
             str(tmp_path / "p.html"), "sparsity=0.5"]
    assert plan.main([DEMO, *words]) == 0
    recipe = load_recipe(DEMO, ["sparsity=0.5"])
    gpu = replace(GPUS["h100"], memory=40 * 2**30, network=7e9, gpus_per_node=3)
    ((asked,), _), = overviews
    assert asked == Request(recipe, asked.plan, gpu, 6, 0.3, "given", 2.5, 5)
    assert parts_of(asked.plan) == parts_of(Plan.of(recipe)) != []
    assert pages == [(({"facts": 1}, DEMO), {})]
    assert rendered == [((recipe, asked.plan, {"facts": 1}, True), {})]
    assert plan.main([DEMO, "--gpu", "a100"]) == 0
    own = load_recipe(DEMO)
    (asked,), _ = overviews[-1]
    assert asked == Request(own, asked.plan, GPUS["a100"], own.parallel.world, None, asked.source,
                            None, 8) and asked.source.startswith("measured on ")
    run = SimpleNamespace(name="a run")
    read, calibrated = keep(plan, "read_run", run), keep(plan, "calibrate", 0.4)
    keep(plan, "measured_step", 1.25)
    calibrating = [DEMO, "--gpu", "h200", "--calibrate", "runs/a"]
    assert plan.main(calibrating) == 0
    (asked,), _ = overviews[-1]
    assert (asked.efficiency, asked.source) == (0.4, "as in runs/a: 1.25 s a step")
    assert read == [((Path("runs/a"),), {})] and calibrated == [((run, GPUS["h200"]), {})]
    counted, shown = keep(plan, "dry_run", []), keep(plan, "render_counts", "")
    exact = [DEMO, "--exact", "--rank", "1", "--rank", "0"]
    assert plan.main(exact) == plan.main(exact[:2]) == 0
    assert [(recipe, parts_of(sparsity), ranks) for (recipe, sparsity, ranks), _ in counted] == [
        (own, parts_of(Plan.of(own)), ranks) for ranks in ([1, 0], ranks_of_interest(own))]
    assert len(shown) == 2
    every(plan.main, [], words, calibrating, exact)


def test_a_fit_is_of_the_runs_and_the_form_that_are_asked_for(keep, every, capsys):
    points = [Point(0.5 * (i % 2), 10.0 + i, 5.0, 2.0, f"run{i}") for i in range(4)]
    found = [Training(point, point.name, i > 1) for i, point in enumerate(points)]
    read, fits = keep(plan, "trainings", found), keep(plan, "fit_law", SimpleNamespace(
        as_plain=lambda: {}))
    chosen = keep(plan, "of_one_algorithm", found[1:])
    words = ["a", "b", "--form", "average", "--starts", "3", "--bootstrap", "4", "--hold-out", "x",
             "--hold-out", "y", "--algorithm", "set", "--json"]
    assert plan.main(["fit", *words]) == 0
    assert read == [(([Path("a"), Path("b")], ["x", "y"]), {})] and not chosen
    assert fits == [((points[:2], 3, 4), {"form": FORMS["average"], "held_out": points[2:]})]
    published = ["c", "--algorithm", "set", "--json"]
    assert plan.main(["fit", *published]) == 0
    assert chosen == [((found, "set"), {})]
    assert fits[-1] == ((points[1:2], 32, 100), {"form": FORMS["published"],
                                                 "held_out": points[2:]})
    every(plan.main, ["fit"], words)


def test_the_published_law_is_asked_at_a_size_and_a_cost(keep, every, tmp_path, capsys):
    described, drawn = keep(plan, "describe_law", {}), keep(plan, "plot_contours")
    words = ["--fit", "vit", "--nonzero", "2M", "--compute", "5e20", "--plot",
             str(tmp_path / "law.png"), "--json"]
    assert plan.main(["law", *words]) == plan.main(["law", "--json"]) == 0
    assert described == [((PUBLISHED["vit"], "vit", 2_000_000, 5e20), {}),
                         ((PUBLISHED["t5"], "t5", 10**8, 1e21), {})]
    assert drawn == [((PUBLISHED["vit"], "vit", tmp_path / "law.png"), {})]
    every(plan.main, ["law"], words)


def test_variants_are_of_the_recipe_its_words_and_the_ranks(keep, every, capsys):
    made, described = keep(plan, "variants", ["v"]), keep(plan, "describe_variants", {})
    words = ["--sparsity", "0.5", "--tensor", "4", "--json", "seed=9"]
    assert plan.main(["iso-flop", DEMO, *words]) == 0
    ((dense, level, load, tensor), _), = made
    assert (dense, level, tensor) == (load_recipe(DEMO, ["seed=9"]), 0.5, 4)
    assert load(["output=x"]) == load_recipe(DEMO, ["seed=9", "output=x"])
    assert described == [((["v"], DEMO, ["seed=9"]), {})]
    every(plan.main, ["iso-flop"], words)


def test_a_page_of_the_law_has_fits_of_as_many_starts_and_samples(keep, every, tmp_path,
                                                                  monkeypatch, capsys):
    grid = SimpleNamespace(plot=SimpleNamespace(frontiers=["a"], panels=["b"]))
    monkeypatch.setattr(law_page, "load_experiment", lambda path: grid)
    monkeypatch.setattr(law_page, "cells", lambda *given: ["cell"])
    monkeypatch.setattr(law_page, "_rows", lambda path, grid: [("rows of", path)])
    monkeypatch.setattr(law_page, "write_predictions", lambda *given: None)
    monkeypatch.setattr(law_page, "merged", lambda *given: [])
    asked = keep(law_page, "predict", ["row"])
    words = ["grid.yaml", "losses.csv", "--into", str(tmp_path), "--starts", "3", "--bootstrap",
             "4"]
    assert law_page.main(["predict", *words]) == law_page.main(["predict", *words[:4]]) == 0
    rows = [("rows of", Path("losses.csv"))]
    assert asked == [((["cell"], grid, rows, *counts), {}) for counts in ((3, 4), (32, 200))]
    fits = keep(law_page, "fit_law", SimpleNamespace(as_plain=lambda: {}))
    monkeypatch.setattr(law_page, "shortcomings", lambda own, form: [])
    point = Point(0.0, 1.0, 1.0, 1.0)
    law_page.fitted([SimpleNamespace(held_out=held, point=replace(point, name=str(held)))
                     for held in (False, True)], law_page.parse_arguments(["page", *words]))
    assert fits == [(([replace(point, name="False")], 3, 4), {"form": form})
                    for form in FORMS.values()]
    every(law_page.main, ["predict"], words)
    every(law_page.main, ["page"], words)


def test_a_report_is_of_its_runs(keep, every, tmp_path, capsys):
    read = keep(report, "read_begun", (["run"], ["left out"]))
    pages = keep(report, "render_report", "page")
    words = ["a", "b", "--output", str(tmp_path / "r.html"), "--title", "mine"]
    assert report.main(words) == 0
    assert read == [(([Path("a"), Path("b")],), {})]
    assert pages == [((["run"], tmp_path / "r.html", "mine", ["left out"]), {})]
    assert (tmp_path / "r.html").read_text() == "page"
    every(report.main, [], words)


def test_text_is_preprocessed_as_asked(keep, every, monkeypatch, tmp_path, capsys):
    manifest = SimpleNamespace(documents=1, tokens=1, text_bytes=1, skipped=0, empty=0,
                               settings=SimpleNamespace(deduplicate=False))
    done, loaded = keep(preprocess_data, "preprocess", manifest), keep(
        preprocess_data, "load_tokenizer", "tokenizer")
    place = str(tmp_path / "out")
    plain = ["--input", "a", "b", "--output", place, "--tokenizer", "t"]
    words = [*plain, "--workers", "3", "--text-key", "body", "--on-error", "skip", "--max-document",
             "2KB", "--split", "90,10", "--by-set", "source", "--per-shard", "--deduplicate",
             "--ftfy", "--no-eod", "--overwrite", "--progress", "--end-of-document", "</s>"]
    assert preprocess_data.main(words) == 0
    ((inputs, prefix, make), asked), = done
    assert (inputs, prefix, make()) == (["a", "b"], place, "tokenizer")
    assert loaded == [((Path("t"), "</s>"), {})]
    assert asked == {
        "workers": 3, "overwrite": True, "progress": True, "text_key": "body", "on_error": "skip",
        "append_eod": False, "max_document_bytes": 2000, "ftfy": True, "deduplicate": True,
        "split": (90.0, 10.0), "set_key": "source", "per_shard": True}
    monkeypatch.setattr(preprocess_data, "usual_workers", lambda paths: 5)
    monkeypatch.setattr(preprocess_data, "expand_inputs", lambda inputs: inputs)
    assert preprocess_data.main(plain) == 0
    assert done[-1][1] == {
        "workers": 5, "overwrite": False, "progress": None, "text_key": "text", "on_error": "stop",
        "append_eod": True, "max_document_bytes": 100_000_000, "ftfy": False, "deduplicate": False,
        "split": None, "set_key": None, "per_shard": False}
    texts, trained = keep(preprocess_data, "sample_texts", "texts"), keep(
        preprocess_data, "train_tokenizer", "new")
    training = ["--train-tokenizer", "bpe", "--vocab-size", "300", "--train-bytes", "1MB"]
    assert preprocess_data.main([*plain[:-1], str(tmp_path / "new"), *training, "--text-key", "k",
                                 "--on-error", "skip"]) == 0
    assert done[-1][0][2]() == "new"
    assert texts == [((["a", "b"], 1_000_000, "k", "skip"), {})]
    assert trained == [(("bpe", "texts", 300, tmp_path / "new"), {})]
    every(preprocess_data.main, [], words, training)


def test_a_grid_is_run_as_asked(keep, monkeypatch, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({
        "recipe": DEMO, "output": str(tmp_path / "out"), "seeds": [1], "plot": {"x": "seedless"},
        "axes": {"seedless": {"a": {"optimizer.lr": 1e-3}, "b": {"optimizer.lr": 2e-3}}}}))
    ran = keep(experiment, "run_all", [2])
    monkeypatch.setattr(experiment, "check_ahead", lambda planned: None)
    for words, jobs, minutes, python in (
            (["--jobs", "3", "--minutes", "2", "--launch", "nice -n 2"], 3, 2, ["nice", "-n", "2"]),
            ([], 1, math.inf, [sys.executable])):
        monkeypatch.setattr(sys, "argv", ["experiment.py", str(tmp_path / "grid.yaml"), "--only",
                                          "seedless=b", *words, "log.every=7"])
        before = time.monotonic()
        assert experiment.main() == 2
        (commands, given, chains, _, until), _ = ran[-1]
        assert given == jobs and before + 60 * minutes <= until <= time.monotonic() + 60 * minutes
        (output, command), = commands.items()
        assert output == tmp_path / "out/seedless=b/seed=1" and chains == [[output]]
        assert command[:-1] == [
            *python, str(ROOT / "pretrain.py"), DEMO, "log.every=7", "optimizer.lr=0.002",
            "seed=1", "sparsity.seed=1"] and command[-1] == f"output={output}"


@pytest.fixture
def begun(keep, monkeypatch):
    """What conversions are begun with."""
    source = SimpleNamespace(tokenizer="its own", origin="x", path=Path("x"),
                             recipe=load_recipe(DEMO), model=load_recipe(DEMO).model)
    monkeypatch.setattr(convert_checkpoint, "read_run", lambda options: source)
    monkeypatch.setattr(convert_checkpoint, "data_tokenizer", lambda recipe: "of the data")
    monkeypatch.setattr(convert_checkpoint, "render_padding", lambda *given: "")
    written = keep(convert_checkpoint, "write_initial_checkpoint", SimpleNamespace(
        plan=Plan.of(load_recipe(DEMO, ["sparsity=0"])), zeros=0.0, losses=None))
    return source, written, keep(convert_checkpoint, "check_text", "text")


SELECTION = ["--select", "wanda", "--calibration", "a", "--calibration-samples", "7",
             "--sequence-length", "9", "--evaluate", "b", "--sparsity", "0.25", "seed=9"]


@pytest.mark.parametrize(("command", "reader"), [
    ("prune", None), ("from-megatron", "MegatronReader"), ("from-deepspeed", "DeepSpeedReader")])
def test_weights_are_selected_as_asked(begun, keep, every, tmp_path, command, reader):
    source, written, checked = begun
    output, words = tmp_path / "out", [*SELECTION, *(["--recipe", DEMO] if reader else [])]
    read = keep(convert_checkpoint, reader, source) if reader else []
    assert convert_checkpoint.main([command, "given", str(output), *words]) == 0
    recipe = load_recipe(DEMO, [f"output={output}", "seed=9", "sparsity=0.25"])
    tokenizer = "of the data" if reader else "its own"
    assert written == [((source, recipe, tokenizer, output, "wanda", "text"), {})]
    assert checked == [((Calibration("a", "b", 7, 9), recipe, tokenizer), {})]
    assert read == ([((Path("given"), recipe.model), {})] if reader else [])
    assert convert_checkpoint.main([command, "given", str(output), *words[len(SELECTION):]]) == 0
    assert checked[-1][0][0] == Calibration(None, None, 128, None)
    assert written[-1][0][4] == "random"
    every(convert_checkpoint.main, [command], words)


def test_a_model_of_hugging_face_is_cut_as_the_recipe_is(begun, keep, every, monkeypatch, tmp_path):
    """And its tokenizer is the one beside the data, as the model's own files describe it."""
    class Reader(SimpleNamespace):
        """Stands in for a directory of Hugging Face."""

    monkeypatch.setattr(convert_checkpoint, "HuggingFaceReader", Reader)
    source, output = Reader(**vars(begun[0])), tmp_path / "out"
    recipe = load_recipe(DEMO, ["seed=9", "sparsity=0.25"])
    opened = keep(convert_checkpoint, "open_weights", source)
    made = keep(convert_checkpoint, "recipe_for", recipe)
    richer = keep(convert_checkpoint, "richer_of", "the richer")
    words = [*SELECTION, "--recipe", DEMO]
    assert convert_checkpoint.main(["from-hf", "given", str(output), *words]) == 0
    assert opened == [((Path("given"),), {}), ((Path("given"),), {"like": recipe.model})]
    assert made == [((source, DEMO, [f'output="{output}"', "seed=9", "sparsity=0.25"]), {})]
    assert richer == [(("of the data", source), {})]
    assert begun[1] == [((source, recipe, "the richer", output, "wanda", "text"), {})]
    assert begun[2] == [((Calibration("a", "b", 7, 9), recipe, "the richer"), {})]
    every(convert_checkpoint.main, ["from-hf"], words)


def test_a_model_is_exported_as_asked(begun, keep, every, tmp_path):
    source, output = begun[0], tmp_path / "out"
    source.model = SimpleNamespace(title="GPT")
    exported = keep(convert_checkpoint, "export")
    words = ["--dtype", "bf16", "--masks", "--shard-size", "0.5"]
    for given in (words, []):
        assert convert_checkpoint.main(["to-hf", "run", str(output), *given]) == 0
    assert exported == [((source, output, "bf16", True, 0.5), {}),
                        ((source, output, "fp32", False, 5.0), {})]
    every(convert_checkpoint.main, ["to-hf"], words)
    saved = keep(convert_checkpoint, "save_for_megatron")
    keep(convert_checkpoint, "arguments", "")
    for given in (words[:2], []):
        assert convert_checkpoint.main(["to-megatron", "run", str(output), *given]) == 0
    assert saved == [((source, output, torch.bfloat16), {}), ((source, output, torch.float32), {})]
    every(convert_checkpoint.main, ["to-megatron"], words)


@pytest.mark.parametrize("command", ["reshard", "branch", "densify"])
def test_a_run_becomes_another_as_asked(begun, keep, monkeypatch, tmp_path, command):
    source, written, _ = begun
    output, found = tmp_path / "out", keep(convert_checkpoint, "find_checkpoint", "found")
    keep(convert_checkpoint, "CheckpointReader", source)
    cut, branched = (keep(convert_checkpoint, name) for name in ("reshard", "branch"))
    words = {"reshard": ["parallel.data=3"], "densify": ["optimizer.lr=0.5"],
             "branch": ["train.tokens=2M", "optimizer.decay=linear"]}[command]
    assert convert_checkpoint.main([command, "run", str(output), *words]) == 0
    if command == "densify":
        (_, recipe, tokenizer, place, select, text), _ = written[-1]
        assert (tokenizer, place, select, text) == ("its own", output, "random", None)
        assert recipe == load_recipe(DEMO, [f"output={output}", "sparsity=0", *words])
        return
    assert found == [((Path("run"),), {"newest": True})]
    layout = source.recipe.parallel
    if command == "reshard":
        wanted = Parallel.model_validate({**layout.model_dump(), "data": 3})
        assert cut == [((source, wanted, output), {})]
    else:
        recipe = load_recipe(DEMO, [f"output={output}", *words])
        assert branched == [((source, recipe, output), {})]
