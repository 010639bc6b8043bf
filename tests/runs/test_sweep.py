"""A sweep runs every combination once, skips what is done, and selects by validation loss among
what is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import make_tokenizer, write_gpt2

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
checkpoint: start
output: {output}
data: {{task: jsonl, path: data}}
train: {{global_batch: 8, micro_batch: 2}}
optimizer: {{lr: 1e-4}}
sweep: {sweep}
"""
# Stands in for finetune.py: its last words are the trial's. Losses by learning rate; one rate
# diverges.
STUB = """
import json, pathlib, sys
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
rate, output = float(words["optimizer.lr"]), pathlib.Path(words["output"])
print("ran", rate, words["train.global_batch"])
if rate == 1.0:
    sys.exit(3)
if rate == 2.0:
    sys.exit(75)
newest = output / "checkpoints/step_00000040"
newest.mkdir(parents=True)
loss = rate + int(words["train.global_batch"])
state = {"step": 40, "best_step": 20, "best_loss": loss, "worse": 1}
recipe = json.loads(pathlib.Path(sys.argv[0]).with_name("training.json").read_text())
(newest / "run.json").write_text(json.dumps({
    "state": state, "recipe": recipe, "tokens": 1, "tokenizer": {"kind": "gpt2", "sha256": "0"},
    "sparsity": {}, "versions": {}, "saved": ""}))
"""


@pytest.fixture
def sweep(tmp_path, recipe):
    """Runs tools/sweep.py over these values, with a stand-in for finetune.py."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "training.json").write_text(json.dumps(
        recipe(train={"tokens": 40 * 8 * 32}, evaluate={"patience": 2}).model_dump()))

    write_gpt2(tmp_path / "start")
    make_tokenizer().save(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "start", dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"data/{split}.jsonl").write_text('{"context": "a", "completion": "b"}\n' * 8)

    def run(values: str, *words: str) -> subprocess.CompletedProcess:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(output=tmp_path / "out", sweep=values))
        launch = [] if "--launch" in words else ["--launch", f"{sys.executable} stub.py"]
        return subprocess.run([sys.executable, str(ROOT / "tools/sweep.py"), "recipe.yaml", *launch,
                               *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    return run


TWO_BY_TWO = "{optimizer.lr: [0.5, 0.25], train.global_batch: [16, 8]}"


def ran(done: subprocess.CompletedProcess) -> list[str]:
    return [line.removeprefix("ran ") for line in done.stdout.splitlines()
            if line.startswith("ran ")]


def selection(tmp_path) -> dict:
    return json.loads((tmp_path / "out/selection.json").read_text())


@pytest.mark.slow
def test_every_combination_runs_once_and_the_lowest_loss_is_selected(sweep, tmp_path):
    done = sweep(TWO_BY_TWO)
    assert done.returncode == 0, done.stderr
    assert ran(done) == ["0.5 16", "0.5 8", "0.25 16", "0.25 8"]
    chosen = selection(tmp_path)
    assert chosen["selected"]["values"] == {"optimizer.lr": 0.25, "train.global_batch": 8}
    assert (chosen["selected"]["validation_loss"], chosen["selected"]["step"]) == (8.25, 20)
    assert chosen["unfinished"] == 0 and len(chosen["runs"]) == 4
    again = sweep(TWO_BY_TWO)
    assert ran(again) == [] and again.stdout.count("done before") == 4 and again.returncode == 0


@pytest.mark.slow
def test_a_run_that_is_not_done_goes_on(sweep, tmp_path):
    sweep(TWO_BY_TWO)
    newest = tmp_path / "out/optimizer.lr=0.25,train.global_batch=8/checkpoints/step_00000040"
    cut = newest.rename(newest.with_name("step_00000030"))
    run = json.loads((cut / "run.json").read_text())
    for state, expected in (({"step": 30}, ["0.25 8"]), ({"step": 30, "worse": 2}, [])):
        (cut / "run.json").write_text(json.dumps({**run, "state": {**run["state"], **state}}))
        selected = sweep(TWO_BY_TWO, "--select")
        assert selection(tmp_path)["unfinished"] == len(expected) and not ran(selected)
        assert ("0.25" in str(selection(tmp_path)["selected"]["values"])) == (
            not expected
        ) or expected
    assert selection(tmp_path)["selected"]["values"] == {"optimizer.lr": 0.25,
                                                         "train.global_batch": 8}


@pytest.mark.slow
def test_printing_runs_nothing_and_an_index_runs_one(sweep, tmp_path):
    printed = sweep(TWO_BY_TWO, "seed=3", "--print")
    lines = printed.stdout.splitlines()
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    assert (
        "finetune.py recipe.yaml seed=3 optimizer.lr=0.5 train.global_batch=8 output=" in lines[1]
    )
    one = sweep(TWO_BY_TWO, "--index", "1")
    assert (one.returncode, ran(one)) == (0, ["0.5 8"])
    assert not (tmp_path / "out/selection.json").exists()  # the tasks of an array end together
    assert sweep(TWO_BY_TWO, "--select").returncode == 0
    assert selection(tmp_path)["unfinished"] == 3


@pytest.mark.slow
def test_a_run_that_diverges_loses_and_one_that_is_stopped_stops_the_sweep(sweep, tmp_path):
    done = sweep("{optimizer.lr: [1.0, 0.5, 2.0, 0.25], train.global_batch: [8]}")
    assert done.returncode == 75 and ran(done) == ["1.0 8", "0.5 8", "2.0 8"]
    assert "exit code 3" in done.stderr
    done = sweep("{optimizer.lr: [1.0, 0.5], train.global_batch: [8]}")
    assert done.returncode == 0 and selection(tmp_path)["selected"]["values"]["optimizer.lr"] == 0.5
    assert sweep("{optimizer.lr: [1.0], train.global_batch: [8]}").returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("values, words, said", [
    ("{}", [], "lists no values to try"),
    ("{optimizer.lr: []}", [], "no values to try for optimizer.lr"),
    ("{optimizer.lrr: [1]}", [], "unknown key optimizer.lrr"),
    ("{optimizer.lr: [1e-4, -1]}", [], "optimizer.lr=-1"),
    (TWO_BY_TWO, ["--index", "4"], "the sweep has 4 runs, 0 to 3"),
    ("{optimizer.warmup_steps: [1, 99]}", [], "optimizer.warmup_steps=99: optimizer.warmup_steps"),
    ("{train.sequence_length: [8, 64]}", [], "train.sequence_length=64"),
    ("{data.path: [data, missing]}", [], "data.path=missing: "),
    (TWO_BY_TWO, ["optimizer.lr=1"], "optimizer.lr: every run of the sweep has a value of its own"),
    (TWO_BY_TWO, ["--launch", "nowhere/torchrun"], "--launch 'nowhere/torchrun' begins with no"),
    ("{optimizer.lr: [1e-4]}", ["--index", "1"], "the sweep has 1 run, 0 to 0"),
    ("{mode: [dense, sparse]}", [], "mode=sparse: mode=sparse keeps the mask of the start"),
])
def test_bad_sweep_is_refused_before_anything_runs(sweep, tmp_path, values, words, said):
    done = sweep(values, *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not ran(done) and not (tmp_path / "out").exists()
