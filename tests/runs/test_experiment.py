"""A grid is every combination once; it goes on where it was interrupted, and reports means and
intervals over seeds."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from warm_commands import run_warm

from megatron_spdf.data.pretraining import corpus
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.reports.score_table import read_scores
from megatron_spdf.runs import experiment
from megatron_spdf.runs.experiment import (
    cells,
    end_of,
    load_experiment,
    render,
    results,
    summary,
)
from megatron_spdf.runs.measured import read_run
from megatron_spdf.schedule.stages import mean_flops, stages_of
from megatron_spdf.training import teacher

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import experiment as tool  # noqa: E402

SHIPPED = sorted((ROOT / "configs/experiments").glob("*.yaml"))
RECIPE = {"output": "run",
          "model": {"layers": 2, "hidden": 32, "heads": 2, "vocab_size": 300, "max_positions": 32},
          "train": {"tokens": 8 * 32 * 4, "global_batch": 8, "micro_batch": 8, "precision": "fp32"},
          "optimizer": {"lr": 1e-3}, "log": {"every": 1, "tensorboard": False, "ranks_every": 0}}
AXES = {"width": {32: {"model.hidden": 32}, 64: {"model.hidden": 64, "model.heads": 4}},
        "sparsity": [0, 0.75]}


@pytest.fixture
def grid(tmp_path):
    """Writes an experiment; returns its path."""
    def write(seeds=(1, 2), axes=AXES, plot=None, recipe=RECIPE, exclude=(),
              **more) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({
            "recipe": "recipe.yaml", "output": str(tmp_path / "out"), "seeds": list(seeds),
            "axes": axes,
            "exclude": list(exclude), "plot": plot or {"x": list(axes)[-1]}, **more},
            sort_keys=False))
        return path
    return write


def grid_of(path: Path):
    experiment = load_experiment(path)
    return experiment, cells(experiment, path, [])


def of(cell) -> Recipe:
    """The recipe of a cell's first run."""
    return next(iter(cell.recipes.values()))


def finish(trial, recipe, *losses: float, step: int | None = None) -> None:
    """Writes what a run leaves behind that came to its end, or to `step`: evaluations with these
    losses, one after each of the last steps."""
    step = step or recipe.steps
    trial.output.mkdir(parents=True)
    (trial.output / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    records = [{"kind": "train", "step": step, "tokens": 1, "loss": 1.0},
               *({"kind": "valid", "step": step - back, "loss": loss}
                 for back, loss in zip(reversed(range(len(losses))), losses, strict=True))]
    (trial.output / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_grid_is_valid(path):
    experiment, found = grid_of(path)
    assert len(found) == {"comparison": 20, "transfer": 90, "fair_comparison": 34,
                          "newborn": 15, "scaling_law": 110, "e2e_ordering": 3,
                          "one_card": 4}[path.stem]
    assert len({t.output for c in found for t in c.trials.values()}) == (
        len(experiment.seeds) * len(found))
    assert not any(of(c).output == experiment.output for c in found)


def test_every_combination_has_its_recipe_and_every_seed_its_masks(grid):
    _, found = grid_of(grid())
    assert [(of(c).model.hidden, of(c).sparsity.level) for c in found] == [
        (32, 0.0), (32, 0.75), (64, 0.0), (64, 0.75)]
    assert [[(r.seed, r.sparsity.seed) for r in c.recipes.values()] for c in found] == [
        [(1, 1), (2, 2)]] * 4


def test_what_is_excluded_is_left_out(grid):
    _, found = grid_of(grid(exclude=[{"width": 64, "sparsity": 0.75},
                                     {"sparsity": 0, "width": 32}]))
    assert [c.labels for c in found] == [{"width": "32", "sparsity": "0.75"},
                                         {"width": "64", "sparsity": "0"}]


def test_equal_flops_are_equal(grid):
    _, found = grid_of(grid(axes={"budget": ["tokens", "flops"], "sparsity": [0, 0.5, 0.75]},
                            recipe=RECIPE | {"train": RECIPE["train"] | {"tokens": 8 * 32 * 1000}}))
    spent = {(c.labels["budget"], c.labels["sparsity"]): mean_flops(stages_of(of(c))).total
             * of(c).steps
             for c in found}
    assert [of(c).steps for c in found if c.labels["budget"] == "tokens"] == [1000] * 3
    assert spent["flops", "0"] == spent["tokens", "0"]
    for level in ("0.5", "0.75"):
        assert spent["flops", level] == pytest.approx(spent["tokens", "0"], rel=1e-3)
        assert spent["tokens", level] < 0.9 * spent["tokens", "0"]


def test_means_and_intervals_are_those_of_a_reference():
    # Student's t at 97.5% and two degrees of freedom is 4.303: 4.303 x 0.1 / sqrt(3).
    assert summary([1.9, 2.0, 2.1]) == (pytest.approx(2.0), pytest.approx(0.2484, abs=1e-4))
    assert summary([2.5]) == (2.5, None)
    assert summary([]) == (None, None)


def test_results_are_those_of_finished_runs(grid):
    path = grid()
    experiment, found = grid_of(path)
    planned = [(c.trials[seed], c.recipes[seed]) for seed in (1, 2) for c in found]
    for number, (trial, recipe) in enumerate(planned[:5]):
        finish(trial, recipe, 2.0 + number / 10)
    finish(planned[5][0], planned[5][1], float("nan"))
    rows = results(found)
    assert [row["losses"] for row in rows] == [{1: 2.0, 2: 2.4}, {1: 2.1}, {1: 2.2}, {1: 2.3}]
    assert [row["missing"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["mean"] == pytest.approx(2.2) and rows[1]["interval"] is None
    table = " ".join(render(experiment, rows).split())
    assert (
        "| 32 | 0 | 1,024 |" in table and "2.2000 ± 2.5412 | 2 |" in table and "1 of 2 |" in table
    )
    changed = planned[0][1].model_copy(update={"seed": 9})
    with pytest.raises(ValueError, match="holds another recipe's run: seed is 1 there and 9 here"):
        end_of(planned[0][0], changed)


def test_a_run_that_stopped_half_way_has_no_result(grid):
    _, found = grid_of(grid(seeds=(1, 2, 3)))
    cell = found[0]
    finish(cell.trials[1], cell.recipes[1], 3.0, 2.0, 2.5)  # the last counts, not the lowest
    finish(cell.trials[2], cell.recipes[2], 9.0, step=2)
    finish(cell.trials[3], cell.recipes[3])  # at its end, and not evaluated there
    row = results(found)[0]
    assert (row["losses"], row["missing"], row["mean"]) == ({1: 2.5}, 2, 2.5)


@pytest.mark.parametrize(("change", "said"), [
    ({"plot": {"x": "depth"}}, "plot names depth, and the axes are width, sparsity"),
    ({"exclude": [{"width": 128}]}, "exclude names width=128, and the labels of width are 32, 64"),
    ({"hold_out": [{"width": 128}]},
     "hold_out names width=128, and the labels of width are 32, 64"),
    ({"baseline": {"sparsity": 0.5}},
     "baseline names sparsity=0.5, and the labels of sparsity are 0, 0.75"),
    ({"baseline": {"depth": 2}}, "baseline names depth=2, and the axes are width, sparsity"),
    ({"plot": {"x": "width", "curves": "depth"}}, "plot names depth, and the axes are width"),
    ({"plot": {"x": "width", "lines": "sparsity", "frontiers": ["0.5"]}},
     "plot.frontiers names 0.5, and the labels of lines are 0, 0.75"),
    ({"plot": {"x": "width", "frontiers": ["0"]}}, "as plot.lines is not given"),
    ({"exclude": ["dense"]}, "exclude.0='dense': input should be a mapping of keys"),
    ({"seeds": ()}, "list should have at least 1 item"),
    ({"axes": {"model.hiden": [32]}}, "unknown key model.hiden"),
    ({"axes": {"budget": ["time"]}}, "budget=time must be tokens, flops or weights"),
    ({"seeds": (3, 1, 3)}, "seeds has 3 twice, which is one run"),
    ({"axes": {"optimizer.lr": [1e-3, 2e-3, 0.001]}}, "optimizer.lr has 0.001 twice"),
    ({"axes": {"optimizer.lr": ["1e-3", 0.001]}}, "has 0.001 twice, as 1e-3 and as 0.001"),
    ({"axes": {"train.tokens": ["4K", 4000]}}, "has 4000 twice, as 4K and as 4000"),
    ({"axes": {"lr": {"1": {"optimizer.lr": 1}, 1: {"optimizer.lr": 2}}}}, "lr has 1 twice"),
    ({"axes": {"lr": {"a": {"optimizer.lr": 1e-3}}, "optimizer.lr": [2e-3]}},
     "would give optimizer.lr two values; let one axis have it"),
    ({"axes": {"seed": [1, 2]}}, "seed is given by seeds"),
    ({"axes": {"lr": {True: {"optimizer.lr": 1}}}}, "lr has the label true, which is what YAML"),
    ({"axes": {"optimizer.lr": 1e-3}, "plot": {"x": "y"}}, "axes.optimizer.lr=0.001"),
    ({"seeds": [True]}, "seeds=[True]: input should be a number, and true is none"),
    ({"plot": {"x": True}}, "plot.x=True: input should be a valid string, and YAML reads"),
    ({"exclude": [{}]}, "exclude has an entry without labels"),
    ({"exclude": [{"sparsity": 0}, {"sparsity": 0.75}]}, "exclude leaves no combination to run"),
])
def test_what_is_no_grid_is_refused_before_a_run(grid, change, said):
    with pytest.raises(ValueError) as caught:
        grid_of(grid(**change))
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["sparsity=0.5", "seed=4", "output=elsewhere"])
def test_an_override_that_the_runs_would_not_follow_is_refused(grid, word):
    path = grid()
    with pytest.raises(ValueError, match=f"^{word.partition('=')[0]}: every run of the grid has a"):
        cells(load_experiment(path), path, ["log.every=2", word])


def test_inputs_of_all_runs_are_looked_at_before_the_first(grid, monkeypatch):
    """Data, and with their tokenizer the teacher; the same ones are looked at once."""
    looked = []

    def look(recipe, *_):
        looked.append(recipe.data.train)
        if recipe.data.train == ["nowhere"]:
            raise FileNotFoundError("there is no nowhere")
        return SimpleNamespace(tokenizer="of the data")

    def teach(recipe, tokenizer):
        assert tokenizer == "of the data"
        if recipe.data.train == ["other"]:
            raise ValueError("the teacher has another tokenizer")

    monkeypatch.setattr(corpus, "check_corpus", look)
    monkeypatch.setattr(teacher, "Teacher", teach)
    for bad, said in (("nowhere", "there is no nowhere"), ("other", "has another tokenizer")):
        looked.clear()
        found = grid_of(grid(axes={"data.train": ["there", bad, "more"]}))[1]
        planned = [(cell.trials[s], cell.recipes[s]) for s in (1, 2) for cell in found]
        with pytest.raises(ValueError, match=f"data.train={bad}/seed=1: .*{said}"):
            tool.check_ahead(planned)
        assert looked == [["there"], [bad]]
        tool.check_ahead([*planned[:1], *planned[2:4]])
        assert looked[2:] == [["there"], ["more"]]


def test_a_launcher_that_is_not_here_is_refused_before_anything_is_looked_at(
        grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "check_ahead", lambda planned: pytest.fail("data are looked at"))
    path = grid(seeds=[1])
    for tune in ({}, {"tune": {"optimizer.lr": 2}}):
        path.write_text(path.read_text() + yaml.safe_dump(tune) * bool(tune))
        monkeypatch.setattr(sys, "argv", ["experiment.py", str(path), "--launch",
                                          "nowhere/run -n 2"])
        assert tool.main() == 2
        assert "--launch 'nowhere/run -n 2' begins with no program" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--print"])  # for another machine
        assert tool.main() == 0 and "\nnowhere/run -n 2" in f"\n{capsys.readouterr().out}"


@pytest.mark.parametrize(("loss", "said"), [
    ('"loss": -3.0', "loss=-3.0: input should be greater than or equal to 0"),
    ('"loss": 3.0, "loss": 2.0', "'loss' is given"), ('"loss": "2.0"', "loss='2.0'")])
def test_a_log_that_is_damaged_is_not_taken_for_a_run_that_has_not_begun(grid, loss, said):
    _, (cell, *_) = grid_of(grid(seeds=[1]))
    finish(cell.trials[1], cell.recipes[1])
    assert cell.loss(1) is None
    log = cell.trials[1].output / "log.jsonl"
    with open(log, "a") as file:
        file.write(f'{{"kind": "valid", "step": {cell.recipes[1].steps}, {loss}}}\n')
    with pytest.raises(ValueError, match=rf"{re.escape(str(log))}, line 2.*{said}"):
        cell.loss(1)


def test_a_log_is_read_once_as_long_as_it_stays(grid, monkeypatch):
    read = []
    monkeypatch.setattr(experiment, "read_run", lambda path: read.append(path) or read_run(path))
    _, (cell, *_) = grid_of(grid(seeds=[1, 2]))
    trial = cell.trials[1]
    assert cell.loss(1) is None and not read
    finish(trial, cell.recipes[1], 2.0)
    assert [cell.loss(1), cell.ended(1)["loss"], results([cell])[0]["losses"]] == [2.0, 2.0,
                                                                                  {1: 2.0}]
    assert read == [trial.output]
    with open(trial.output / "log.jsonl", "a") as log:
        log.write(json.dumps({"kind": "valid", "step": cell.recipes[1].steps, "loss": 1.5}) + "\n")
    assert [cell.loss(1), cell.loss(1)] == [1.5, 1.5] and len(read) == 2
    other = yaml.safe_dump({**cell.recipes[1].model_dump(), "seed": 7})
    (trial.output / "recipe.yaml").write_text(other)
    for _ in range(2):
        with pytest.raises(ValueError, match="holds another recipe's run: seed is 7 there"):
            cell.loss(1)
    assert len(read) == 3


@pytest.mark.slow
def test_a_grid_is_run_reported_and_not_run_again(grid, tmp_path):
    text = Path(argparse.__file__).read_text()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tool = [sys.executable, "-W", "ignore", str(ROOT / "tools/preprocess_data.py"), "--input",
            "text.jsonl",
            "--output", "data", "--tokenizer", "tokenizer", "--train-tokenizer", "bpe",
            "--vocab-size", "300"]
    subprocess.run(tool, cwd=tmp_path, check=True, capture_output=True)
    data = {"train": str(tmp_path / "data"), "valid": str(tmp_path / "data"), "workers": 0}
    path = grid(seeds=[1], axes={"sparsity": [0, 0.75]},
                recipe=RECIPE | {"data": data, "evaluate": {"batches": 1}})

    def run(*words: str, code: int = 0) -> str:
        done = run_warm([ROOT / "tools/experiment.py", path, *words], tmp_path, dict(os.environ))
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    assert len(run("--print").splitlines()) == 2
    assert "1 run, 1 to do" in run("--only", "sparsity=0.75")
    assert "2 runs, 1 to do" in run()  # only the other
    assert "2 runs, 0 to do" in run()
    cells_there = json.loads((tmp_path / "out/results.json").read_text())["cells"]
    for cell in cells_there:
        log = (tmp_path / "out" / f"sparsity={cell['labels']['sparsity']}" / "seed=1"
               / "log.jsonl").read_text()
        records = [json.loads(line) for line in log.splitlines()]
        assert cell["losses"]["1"] == [r["loss"] for r in records if r["kind"]
                                       == "valid"][-1] == cell["mean"]
        assert cell["flops"] == pytest.approx([r["flops"] for r in records if r["kind"]
                                               == "train"][-1])
    assert cells_there[0]["mean"] != cells_there[1]["mean"]
    assert (tmp_path / "out/results.md").read_text().count("\n| 0") == 2
    assert (tmp_path / "out/results.png").stat().st_size > 1000
    run("--only", "sparsity=0.5", code=2)
    _fine_tune(path, tmp_path, run)


def _fine_tune(path: Path, place: Path, run) -> None:
    """The sparse run is fine-tuned with its mask, decoded and scored, once."""
    pairs = [json.dumps({"context": f"a {n}", "completion": f"b {n}"}) for n in range(8)]
    (place / "pairs").mkdir()
    for split in ("train", "validation", "test"):
        (place / f"pairs/{split}.jsonl").write_text("\n".join(pairs) + "\n")
    (place / "tune.yaml").write_text(yaml.safe_dump({
        "checkpoint": "none", "output": "none", "data": {"task": "jsonl", "path": "pairs"},
        "train": {"epochs": 1, "global_batch": 4, "micro_batch": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "log": {"every": 1, "tensorboard": False, "ranks_every": 0}}))
    path.write_text(path.read_text() + yaml.safe_dump({"finetune": {
        "recipe": "tune.yaml", "axes": {"mode": ["sparse"]},
        "decoding": {"beams": 2, "max_new_tokens": 4}}}))
    only = ("--only", "sparsity=0.75")
    assert "1 run, 0 to do, and 2 fine-tunings and evaluations" in run(*only)
    (row,) = read_scores(place / "out/scores.csv")
    assert row.labels == {"sparsity": "0.75", "mode": "sparse"} and row.seed == 1
    before = json.loads((place / "out/results.json").read_text())["cells"][0]
    assert row.pretraining_loss == before["mean"]
    assert row.pretraining_flops == pytest.approx(before["flops"]) and row.fine_tuning_flops > 0
    assert row.scores.keys() >= {"BLEU", "perplexity"} and row.scores["perplexity"] > 1.0
    assert "1 run, 0 to do\n" in run(*only)
