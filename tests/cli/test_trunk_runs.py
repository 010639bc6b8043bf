"""Branches of a trunk that was interrupted equal runs that go alone, to the last digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_spdf.runs.loss_table import read_table

pytestmark = pytest.mark.slow

PER_STEP = 8 * 32
RIGL = {"sparsity.level": 0.75, "sparsity.algorithm": "rigl", "sparsity.update.every": 3,
        "sparsity.update.anneal": "constant", "sparsity.update.stop": 0.85,
        "optimizer.decay": "minus_sqrt", "optimizer.decay_share": 0.2, "checkpoint.every": 0,
        "checkpoint.keep": 1, "evaluate.every": 0, "log.tensorboard": False}


@pytest.fixture(scope="module")
def grids(workplace):
    """A trunk of 40 steps that is stopped after 12 and has branches of 20 and 10, and runs of 10
    and of 20 steps alone; output of the calls, directory of the runs."""
    for name in ("shared", "alone"):
        (workplace / f"{name}.yaml").write_text(yaml.safe_dump({
            "recipe": "recipe.yaml", "output": name, "seeds": [1],
            "axes": {"masks": {"rigl": RIGL},
                     "length": {n: {"train.tokens": n * PER_STEP} for n in (10, 20, 40)}},
            "plot": {"x": "length"}}, sort_keys=False))
    calls = [[12, "shared.yaml"], [0, "shared.yaml"], [0, "alone.yaml", "--only", "length=10"],
             [0, "alone.yaml", "--only", "length=20"]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("forked_grid.py")),
         json.dumps(calls)], cwd=workplace, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [75, 0, 0, 0], done.stdout + done.stderr
    return workplace


def records(run: Path) -> list[tuple]:
    """Kind, step, loss and gradient norm of what a run trained and evaluated."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in lines
            if r["kind"] in ("train", "valid")]


@pytest.mark.parametrize("length", [10, 20])
def test_a_branch_equals_a_run_that_goes_alone(grids, length):
    place = f"masks=rigl,length={length}/seed=1"
    branch = records(grids / "shared" / place)
    assert branch == records(grids / "alone" / place) and len(branch) == length + 1
    trunk = records(grids / "shared/masks=rigl,length=40/seed=1")
    begin = length * 4 // 5
    assert branch[:begin] == trunk[:begin] and branch[begin + 1] != trunk[begin + 1]
    saved = (grids / "shared" / place / "checkpoints").iterdir()
    assert sorted(path.name for path in saved) == [f"step_{length:08}"]


def test_a_trunk_keeps_where_branches_begin_and_goes_on_after_a_stop(grids):
    trunk = grids / "shared/masks=rigl,length=40/seed=1"
    assert sorted(path.name for path in (trunk / "checkpoints").iterdir()) == [
        "step_00000008", "step_00000016", "step_00000040"]
    assert [step for kind, step, *_ in records(trunk) if kind == "train"] == [*range(1, 41)]


def test_the_table_has_their_losses(grids):
    rows = read_table(grids / "shared/losses.csv")
    assert [row.labels["length"] for row in rows] == ["10", "20", "40"]
    for row in rows:
        run = grids / f"shared/masks=rigl,length={row.labels['length']}/seed=1"
        assert row.loss == records(run)[-1][2] and row.standard_error > 0.0
    assert len({row.cell for row in rows}) == 1  # they share their noise
