"""Runs of a grid are fine-tuned and scored, each after the run that it starts from, and what is
done is not done again."""

from __future__ import annotations

import json
import shutil
import sys
from math import nan
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_models import gpt2_tensors, make_tokenizer, write_gpt2
from test_experiment import ROOT, finish
from test_experiment import grid as grid  # a fixture  # noqa: PLC0414

from megatron_spdf.data.finetuning.task import count_pairs
from megatron_spdf.data.pretraining import corpus
from megatron_spdf.runs import downstream
from megatron_spdf.runs import grid as runner
from megatron_spdf.runs.budget import linear_weights
from megatron_spdf.runs.downstream import Downstream, tunings
from megatron_spdf.runs.experiment import cells, load_experiment

sys.path.insert(0, str(ROOT / "tools"))
import experiment as tool  # noqa: E402

AXES = {"masks": {"dense": {"sparsity.level": 0}, "75%": {"sparsity.level": 0.75}}}
FINETUNE = {"recipe": "tune.yaml", "axes": {"mode": ["dense", "sparse"]},
            "exclude": [{"masks": "dense", "mode": "sparse"}],
            "decoding": {"beams": 4, "max_new_tokens": 9}}


@pytest.fixture
def asked(grid, tmp_path, monkeypatch):
    """Writes a grid that fine-tunes; returns its path."""
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({
        "checkpoint": "none", "output": "none", "data": {"task": "e2e", "path": "data/e2e"},
        "train": {"epochs": 1, "global_batch": 4, "micro_batch": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1}}))
    (tmp_path / "data/e2e").mkdir(parents=True)
    for name in ("trainset", "devset", "testset"):
        (tmp_path / f"data/e2e/{name}.csv").write_text(
            "mr,ref\n" + "".join(f"name[{name} {i}],Come in.\n" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "data_tokenizer", lambda recipe: make_tokenizer())
    monkeypatch.setattr(tool, "check_ahead", lambda planned: None)
    return lambda **more: grid(axes=AXES, finetune={**FINETUNE, **more})


def tuned(path: Path) -> list:
    """All fine-tuning runs of a grid."""
    experiment = load_experiment(path)
    return [each for cell in cells(experiment, path, []) for each in tunings(
        experiment.finetune, cell.labels, {s: t.output for s, t in cell.trials.items()},
        path.parent)]


def test_every_run_is_fine_tuned_with_every_label_and_its_own_seed(asked, tmp_path):
    found = tuned(asked())
    assert [(*each.labels.values(), each.seed) for each in found] == [
        ("dense", "dense", 1), ("dense", "dense", 2), ("75%", "dense", 1), ("75%", "sparse", 1),
        ("75%", "dense", 2), ("75%", "sparse", 2)]
    last = found[-1]
    assert last.start == tmp_path / "out/masks=75%/seed=2"
    assert (last.recipe.checkpoint, last.recipe.seed, last.recipe.mode) == (
        str(last.start), 2, "sparse")
    assert last.trial.output == tmp_path / "out/finetune/masks=75%,mode=sparse/seed=2"
    tune, score = last.commands(Path("tune.yaml"), "").items()
    assert tune[0] == last.trial.output and tune[1][1:3] == [str(ROOT / "finetune.py"), "tune.yaml"]
    assert score[0] == last.trial.output / "evaluation/e2e_test"
    assert score[1][2:] == [str(last.trial.output), "--task=e2e", "--split=test", "--beams=4",
                            "--max-new-tokens=9"]


def test_what_is_done_and_scored_is_not_done_again(asked, monkeypatch):
    each = tuned(asked())[0]
    each.trial.output.mkdir(parents=True)
    (each.trial.output / "recipe.yaml").write_text(yaml.safe_dump(each.recipe.model_dump()))
    for done in (False, True):
        monkeypatch.setattr(downstream, "result_of", lambda trial, done=done: {"done": done})
        assert [*each.commands(Path("r"), "")] == [each.trial.output, each.scores][done:]
    each.scores.mkdir(parents=True)
    (each.scores / "scores.json").write_text("{}")
    assert each.commands(Path("r"), "") == {}
    other = each.recipe.model_copy(update={"mode": "sparse"})
    (each.trial.output / "recipe.yaml").write_text(yaml.safe_dump(other.model_dump()))
    with pytest.raises(ValueError, match="holds another recipe's run: mode is sparse there and"):
        each.commands(Path("r"), "")


def test_each_waits_for_the_run_that_it_starts_from(asked, monkeypatch, tmp_path, capsys):
    """The dense run of seed 2 stops before its last step, so that nothing is made of it."""
    path, started = asked(), []
    experiment = load_experiment(path)
    planned = {trial.output: (trial, cell.recipes[seed]) for cell in cells(experiment, path, [])
               for seed, trial in cell.trials.items()}

    def run(words, until, **options):
        output = Path(next(w for w in words if w.startswith("output=")).partition("=")[2]
                      if "--task=e2e" not in words else words[2])
        started.append((Path(words[1]).stem, output.relative_to(tmp_path / "out")))
        if output in planned:
            stops = started[-1][1] == Path("masks=dense/seed=2")
            finish(*planned[output], 2.0, step=planned[output][1].steps - stops)
        return 0

    monkeypatch.setattr(runner, "_exit_code", run)
    monkeypatch.setattr(downstream.Tuned, "done", property(
        lambda self: ("finetune", self.trial.output.relative_to(tmp_path / "out")) in started))
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(path)])
    assert tool.main() == 3
    assert started[:3] == [
        ("pretrain", Path("masks=dense/seed=1")),
        ("finetune", Path("finetune/masks=dense,mode=dense/seed=1")),
        ("evaluate", Path("finetune/masks=dense,mode=dense/seed=1"))]
    assert len(started) == 4 + 5 + 5
    said = capsys.readouterr()
    assert "mode=dense/seed=2 is not begun, as" in said.out
    assert "mode=dense/seed=2 is not scored, as it is not at its end" in said.out
    assert "6 of 6 fine-tuned runs have no scores" in said.err


@pytest.mark.parametrize(("missing", "change", "said"), [
    ("trainset.csv", {}, "the train split of e2e"),
    ("testset.csv", {}, "the test split of e2e"),
    ("", {"axes": {"train.sequence_length": [4096]}, "exclude": []}, "sequence_length=4096"),
    ("", {"axes": {"optimizer.warmup_steps": [9]}, "exclude": []}, "optimizer.warmup_steps=9"),
    ("", {"axes": {"train.sequence_length": [32, 9]}, "exclude": []}, "a completion of 10 tokens"),
    ("", {"axes": {"train.sequence_length": [9]}, "exclude": [], "too_long": "leave_out"},
     "none of its 8 completions fits the window of 9"),
    ("", {"decoding": {}}, "max_new_tokens=64 leaves no room"),  # the task's own
    ("", {"exclude": []}, "name these labels in finetune.exclude"),
])
def test_what_would_stop_after_the_pre_training_stops_before(
        asked, monkeypatch, capsys, missing, change, said):
    left_out = change.pop("too_long", "refuse")
    path = asked(**change)
    tune = yaml.safe_load(Path("tune.yaml").read_text())
    tune["data"]["too_long"] = left_out
    Path("tune.yaml").write_text(yaml.safe_dump(tune))
    if missing:
        Path("data/e2e", missing).unlink()
    monkeypatch.setattr(runner, "_exit_code", lambda *_, **options: pytest.fail("a run began"))
    count_pairs.cache_clear()
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(path)])
    assert tool.main() == 2
    assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(path), "--print"])
    assert tool.main() == 0  # to be run elsewhere


def put_tokenizer(model: Path, merges: int) -> None:
    """Puts a tokenizer beside a model, in the place of the one that is there."""
    files = model.parent / f"tokenizer_{merges}"
    make_tokenizer(merges).save(files)
    shutil.copytree(files, model, dirs_exist_ok=True)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda teacher: shutil.rmtree(teacher), "is no directory"),
    (lambda teacher: put_tokenizer(teacher, 1), "has the tokenizer"),
    (lambda teacher: save_file({**gpt2_tensors(), "transformer.ln_f.bias": torch.full((12,), nan)},
                               teacher / "model.safetensors"), "not finite"),
    (lambda teacher: None, ""),
], ids=["missing", "tokenizer", "nan", "sound"])
def test_a_teacher_is_looked_at_before_the_pre_training(
        asked, monkeypatch, capsys, tmp_path, damage, said):
    teacher, began = write_gpt2(tmp_path / "teacher", n_positions=10), []
    put_tokenizer(teacher, 2)
    short = {"train.sequence_length": 10, "distill.teacher": str(teacher)}
    path = asked(axes={"taught": {"yes": short}}, exclude=[])
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["model"]["vocab_size"] = 259
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    damage(teacher)
    downstream._require_sound.cache_clear()
    monkeypatch.setattr(runner, "_exit_code", lambda words, over, **options: began.append(1) or 3)
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(path)])
    assert tool.main() == (2 if said else 3)
    assert said in capsys.readouterr().err and bool(began) is not bool(said)


def test_the_shipped_ordering_is_fifteen_fine_tunings_in_spdfs_order():
    path = ROOT / "configs/experiments/e2e_ordering.yaml"
    found = tuned(path)
    assert len({each.trial.output for each in found}) == len(found) == 15
    arms = {(each.labels["masks"], each.recipe.mode) for each in found}
    assert arms == {("dense", "dense"), ("50%", "dense"), ("50%", "sparse"), ("75%", "dense"),
                    ("75%", "sparse")}
    recipes = [cell.recipes[1] for cell in cells(load_experiment(path), path, [])]
    (weights,) = {linear_weights(recipe) for recipe in recipes}
    assert {recipe.steps * recipe.tokens_per_step / weights for recipe in recipes} == {10.0}


def test_a_command_that_is_asked_to_stop_ends_the_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "_exit_code", lambda words, over, **options: -15)
    assert runner.run_all({tmp_path / "a": ["x"], tmp_path / "b": ["x"]}) == [75]


def test_a_grid_puts_nothing_into_a_checkpoint_nor_in_the_place_of_a_file(monkeypatch, tmp_path):
    (tmp_path / "step").mkdir()
    for name in ("run.json", "files.json"):
        (tmp_path / "step" / name).touch()
    (tmp_path / "link").symlink_to("step")
    (tmp_path / "file").touch()
    monkeypatch.setattr(runner, "_exit_code", lambda *_, **options: pytest.fail("a run began"))
    for place, said in (("link", "to which nothing may be added"), ("file", "is a file")):
        with pytest.raises(ValueError, match=said):
            runner.run_all({tmp_path / "a": ["x"], tmp_path / place / "grid/b=1/seed=1": ["x"]}, 2)
    assert {path.name for path in (tmp_path / "step").iterdir()} == {"run.json", "files.json"}


@pytest.mark.parametrize(("change", "said"), [
    ({"exclude": [{"masks": "50%"}]},
     "finetune.exclude names masks=50%, and the labels of masks are "),
    ({"order": [{"depth": "1"}]}, "finetune.order names depth=1, and the axes are "),
    ({"axes": {"masks": {"a": {"mode": "dense"}}}}, "which is an axis of the grid"),
    ({"axes": {"seed": [4, 5]}, "exclude": []}, "finetune.axes gives seed a value, which every"),
    ({"axes": {"mode": ["thin"]}, "exclude": []}, "mode"),
    ({"decoding": {"beams": 0}}, "finetune.decoding.beams"),
])
def test_what_cannot_be_fine_tuned_is_refused_before_a_run(asked, change, said):
    with pytest.raises(ValueError) as caught:
        tuned(asked(**change))
    assert said in str(caught.value)


def test_a_grid_that_tunes_is_not_fine_tuned(grid):
    with pytest.raises(ValueError, match="no runs to fine-tune before its searches end"):
        load_experiment(grid(axes=AXES, finetune=FINETUNE, tune={"optimizer.lr": 2}))


def test_short_axes_are_labels_and_numbers_name_them():
    short = Downstream(recipe="r", axes={"optimizer.lr": [1e-3]}, exclude=[{"optimizer.lr": 1e-3}],
                       order=[{"width": 64}])
    assert json.loads(short.model_dump_json())["axes"] == {
        "optimizer.lr": {"0.001": {"optimizer.lr": 1e-3}}}
    assert (short.exclude, short.order) == ([{"optimizer.lr": "0.001"}], [{"width": "64"}])
