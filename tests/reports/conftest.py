"""tools/report.py, and runs for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from report_runs import pretraining, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "tools/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def runs(tmp_path):
    """A dense and a sparse pre-training run, and a fine-tuning run on E2E from each."""
    dense = write(tmp_path / "runs/dense", pretraining(0.0), 4e12, 0.0)
    sparse = write(tmp_path / "runs/s75 <b>&", pretraining(0.75), 1.6e12, 0.75)
    found = [dense, sparse]
    for name, start in (("dense_e2e", dense), ("s75_e2e", sparse)):
        checkpoint = start / "checkpoints" / "step_00000030"
        tuned = write(tmp_path / "runs" / name,
                      {"checkpoint": str(checkpoint), "data": {"task": "e2e"}}, 0.4e12, 0.0)
        (scored := tuned / "evaluation/e2e_test").mkdir(parents=True)
        (scored / "scores.json").write_text(json.dumps({"task": "e2e",
                                                        "scores": {"all": {"BLEU": 61.25}}}))
        found.append(tuned)
    return found
