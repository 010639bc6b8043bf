"""A task that lies outside the package, mirror_task.py, works wherever one of ours does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_models import save_gpt2
from user_command import run_with

from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

WORDS = ["stone", "Lake", "tree", "sun", "moon", "Star", "rain", "snow", "sky", "fog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a tiny GPT-2 to start from, the task's three splits and a recipe."""
    place = tmp_path_factory.mktemp("mirror")
    train_tokenizer("bpe", WORDS * 3, 270, place / "start")
    save_gpt2("narrow", place / "start")
    (place / "data").mkdir()
    for split, words in (("train", WORDS), ("valid", WORDS[:4]), ("test", WORDS[2:6])):
        lines = "".join(f"{word} > {word[::-1]}\n" for word in words)
        (place / "data" / f"{split}.pairs").write_text(lines)
    (place / "recipe.yaml").write_text(yaml.safe_dump({
        "checkpoint": "start", "output": "run", "engine": "megatron",
        "data": {"task": "mirror", "path": "data"},
        "train": {"epochs": 2, "global_batch": 4, "micro_batch": 2, "precision": "fp32"},
        "optimizer": {"lr": 1e-3}, "log": {"every": 1}}))
    return place


def run(place: Path, *words: str, plugins: str = "mirror_task") -> subprocess.CompletedProcess:
    """A command of the project, as a user starts it who has the task's directory on the path."""
    return run_with(place, *words, plugins=plugins)


@pytest.mark.slow
def test_it_is_trained_decoded_and_scored(place):
    done = run(place, "finetune.py", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "mirror: 10 training and 4 validation pairs" in done.stdout
    done = run(place, "tools/evaluate.py", "run", "--task", "mirror", "--data", "data", "--beams",
               "1", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "run/evaluation/mirror_test/scores.json").read_text())
    assert {part: set(figures) for part, figures in found["scores"].items()} == {
        "all": {"exact", "BLEU", "perplexity"}, "long": {"exact", "BLEU"},
        "short": {"exact", "BLEU"}}
    official = place / "run/evaluation/mirror_test/reference0"
    assert official.read_text() == "eert\nnus\nnoom\nrats\n"


@pytest.mark.slow
def test_outputs_of_others_are_scored_in_its_form(place):
    (place / "outputs.txt").write_text("EERT\nnus\nnoom\nstar\n")
    done = run(place, "tools/evaluate.py", "--task", "mirror", "--predictions", "outputs.txt",
               "--references", "data/test.pairs", "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["scores"]
    assert scores["all"]["exact"] == 0.75 and scores["short"]["exact"] == 1.0
    assert scores["long"]["exact"] == pytest.approx(2 / 3)


def test_help_lists_it(place):
    shown = run(place, "tools/evaluate.py", "--help").stdout
    assert re.search("^  mirror +words to their mirror images$", shown, re.M) and "webnlg" in shown


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("finetune.py", "recipe.yaml", "output=none"),
    ("tools/evaluate.py", "nowhere", "--task", "mirror"),
    ("tools/evaluate.py", "--predictions", "nowhere", "--references", "nowhere", "--task",
     "mirror")])
def test_without_its_file_it_is_unknown_before_anything_is_touched(place, words):
    done = run(place, *words, plugins="")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "there is no task 'mirror'; known: " in done.stderr
    for name in ("e2e", "webnlg", "dart", "curation", "scitldr", "jsonl"):
        assert name in done.stderr
    assert not (place / "none").exists()
