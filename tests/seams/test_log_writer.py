"""A log writer that lies outside the package, note_taker.py, works wherever ours do."""

from __future__ import annotations

from functools import partial

import pytest
import yaml
from user_command import run_with

pytestmark = pytest.mark.slow
run = partial(run_with, plugins="note_taker")


def test_it_brings_its_key_its_check_and_gets_the_figures_of_every_start(make_recipe, tmp_path):
    rates = {"lr": 1e-3, "warmup_tokens": 256, "decay": "constant"}
    values = make_recipe(str(tmp_path / "run"), optimizer=rates,
                         log={"every": 1, "tensorboard": False, "notes": "notes.txt"})
    values["train"] |= {"tokens": 8 * 32 * 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", plugins="")
    assert refused.returncode == 2 and "unknown key log.notes" in refused.stderr
    refused = run(tmp_path, "pretrain.py", "recipe.yaml", "log.notes=a/b")
    assert refused.returncode == 2 and "is no plain name" in refused.stderr
    assert not (tmp_path / "run").exists()
    for tokens in (8 * 32 * 2, 8 * 32 * 3):
        done = run(tmp_path, "pretrain.py", "recipe.yaml", f"train.tokens={tokens}")
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/notes.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines if "train/loss" in line] == ["1", "2", "3"]
    assert "log.notes" in run(tmp_path, "pretrain.py", "--help").stdout
