"""Records of ours that were damaged are refused with a sentence that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from small_models import make_recipe

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.run_metadata import RunState, read_run_record
from megatron_spdf.data.indexed.manifest import read_manifest
from megatron_spdf.data.pretraining.blend import BlendHistory
from megatron_spdf.reports.runs import read_all
from megatron_spdf.resilience.restarts import STARTS, restart_refusal
from megatron_spdf.runs.experiment import load_experiment
from megatron_spdf.runs.measured import read_run

STEP = {"kind": "train", "step": 1, "tokens": 32, "loss": 5.0, "step_seconds": 1.0,
        "sparsity": 0.5, "flops": 1e9, "tokens_per_second": 3.0}
RUN = {"state": vars(RunState(step=1)), "tokens": 32, "recipe": make_recipe().model_dump(),
       "tokenizer": {"kind": "gpt2", "sha256": "0"}, "sparsity": {}, "versions": {}, "saved": ""}


def read_report(path: Path) -> None:
    read_all([path.parents[2]])


# File in a run directory -> its sound content, and what reads it.
RECORDS = {
    "run.json": (RUN, read_run_record),
    "checkpoints/best.json": ({"checkpoint": "step_00000001", "loss": 1.0},
                              lambda path: store.best(path.parent)),
    "checkpoints/step_00000001/files.json": (
        {"a": {"bytes": 1, "sha256": "0"}}, lambda path: store.verify(path.parent)),
    "log.jsonl": (STEP, lambda path: read_run(path.parent)),
    "recipe.yaml": (make_recipe().model_dump(), lambda path: read_run(path.parent)),
    "evaluation/e2e/scores.json": ({"scores": {"all": {"BLEU": 1.0}}}, read_report),
    "blend.json": ([{"first": 0, "weights": {"a": 1.0}, "taken": {"a": 0}, "paths": {"a": "b"}}],
                   lambda path: BlendHistory(path.parent, [])),
    "data.json": ({"documents": 1, "tokens": 2, "dtype": "uint16", "bin_bytes": 4, "idx_bytes": 9},
                  lambda path: read_manifest(path.with_suffix(""))),
    "grid.yaml": ({"recipe": "r.yaml", "output": "o", "seeds": [1], "axes": {"seed": [1, 2]},
                   "plot": {"x": "seed"}}, load_experiment),
}
DAMAGE = {
    "empty": lambda text: b"",
    "cut short": lambda text: text[:len(text) // 2] + b"\n{",
    "not UTF-8": lambda text: text[:-2] + b"\xff" + text[-2:],
    "control characters": lambda text: b"\x00\x1b" + text,
    "null": lambda text: b"null\n",
    "a number": lambda text: b"7\n",
    "a text": lambda text: b'"x"\n',
    "a list of lists": lambda text: b"[[1]]\n",
    "an object of nothing": lambda text: b'{"": {}}\n',
    "deep": lambda text: b"[" * 5000 + b"]" * 5000 + b"\n",
    "deeper than any stack": lambda text: b'{"a":' * 100_000 + b"\n",
    "a long number": lambda text: b'{"step": ' + b"9" * 5000 + b"}\n",
    "a key twice": lambda text: b'{"step": 1, "step": 2, "a": 1, "a": 2}\n',
    "a directory": None,
    "a pipe": None,
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with every record."""
    for name, (content, _) in RECORDS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml"
                        else json.dumps(content) + "\n")
    (tmp_path / "checkpoints/step_00000001/a").write_text("a")
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_named(run, name, damage):
    path, change = run / name, DAMAGE[damage]
    content = path.read_bytes()
    if change:
        path.write_bytes(change(content))
    else:
        path.unlink()
        path.mkdir() if damage == "a directory" else os.mkfifo(path)
    with pytest.raises((ValueError, OSError)) as refused:
        RECORDS[name][1](path)
    said = str(refused.value)
    assert path.name in said or "it has no " in said
    assert len(said) < 2000 and "\x1b" not in said


@pytest.mark.parametrize("name", ["log.jsonl", "recipe.yaml", "evaluation/e2e/scores.json"])
def test_a_file_of_a_report_that_lies_elsewhere_is_named(run, tmp_path_factory, name):
    path, elsewhere = run / name, tmp_path_factory.mktemp("elsewhere") / "file"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of .*{elsewhere}"):
        read_all([run])
    path.unlink()
    elsewhere.rename(path.with_suffix(".kept"))
    path.symlink_to(path.with_suffix(".kept").name)  # within the run it is the run's
    assert read_all([run])


def test_a_checkpoint_under_another_steps_name_is_named(run):
    for name in ("step_00000001", "a copy", "step_1"):
        path = (run / "run.json").rename(run / "checkpoints/run.json")
        place = run / "checkpoints" / name
        place.mkdir(exist_ok=True)
        assert read_run_record(path.rename(place / "run.json"))["state"]["step"] == 1
        (place / "run.json").rename(run / "run.json")
    place = run / "checkpoints/step_00000099"
    place.mkdir()
    path = (run / "run.json").rename(place / "run.json")
    with pytest.raises(ValueError, match="of step 1, and step_00000099 .* call it step_00000001"):
        read_run_record(path)


@pytest.mark.parametrize("wrong", ["x", -1, [], {}, True, 1.5, None])
@pytest.mark.parametrize("name,keys", [
    ("run.json", ("state",)), ("run.json", ("state", "step")),
    ("run.json", ("tokenizer", "sha256")),
    ("run.json", ("recipe", "train")), ("run.json", ("sparsity",)), ("log.jsonl", ("step",)),
    ("log.jsonl", ("tokens",)), ("log.jsonl", ("kind",)),
    ("checkpoints/best.json", ("checkpoint",)), ("recipe.yaml", ("train",)),
    ("checkpoints/step_00000001/files.json", ("a",)),
    ("checkpoints/step_00000001/files.json", ("a", "bytes")),
    ("evaluation/e2e/scores.json", ("scores",)), ("evaluation/e2e/scores.json", ("scores", "all")),
    ("blend.json", (0, "weights")), ("data.json", ("documents",)), ("grid.yaml", ("axes",))])
def test_a_value_of_another_type_is_named(run, name, keys, wrong):
    content = json.loads(json.dumps(RECORDS[name][0]))
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = wrong
    path = run / name
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml"
                    else json.dumps(content) + "\n")
    try:
        RECORDS[name][1](path)
    except (ValueError, OSError) as error:
        assert path.name in str(error) or "training step" in str(error) or "is damaged" in str(
            error)


def test_a_damaged_count_of_starts_allows_another(run):
    for change in filter(None, DAMAGE.values()):
        (run / STARTS).write_bytes(change(b'{"job": "", "step": 0, "allowed": 1, "starts": 1}'))
        assert restart_refusal(run) == ""
