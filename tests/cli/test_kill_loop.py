"""Invariant 6: a run that is killed at any moment, any number of times, loses no checkpoint."""

import json
import os
from pathlib import Path

import pytest
from test_pretrain import records
from warm_commands import run_warm

pytestmark = pytest.mark.slow

# 50 take minutes on two cores: KILLS=50 pytest tests/cli/test_kill_loop.py
KILLS = int(os.environ.get("KILLS", "6"))


def test_killed_over_and_over_equals_straight(workplace, start):
    words = ("parallel.tensor=2", "checkpoint.every=2", "train.tokens=6144",
             "log.tensorboard=false")
    straight = start("output=kill-straight", *words, ranks=2)
    out, err = straight.communicate(timeout=300)
    assert straight.returncode == 0, out + err
    recipe = workplace / "kill.yaml"
    recipe.write_text("extends: recipe.yaml\ncheckpoint: {every: 2}\nlog: {tensorboard: false}\n"
                      "parallel: {timeout: 30}\n"
                      "fault_tolerance: {join_seconds: 20, hang_seconds: 20}\n")
    script = Path(__file__).with_name("kill_loop.py")
    done = run_warm([script, "kill.yaml", str(KILLS), "1"], workplace, dict(os.environ), 1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == KILLS and found["hung"] == 0, found
    assert 0 < found["of one rank"] < KILLS, found
    for run in found["runs"]:
        assert records(workplace / run) == records(workplace / "kill-straight")
        assert not list((workplace / run / "checkpoints").glob("*.partial"))
    said = sum((workplace / f"{run}.txt").read_text().count("a save that did not finish")
               for run in found["runs"])
    assert (said > 0) == (found["while saving"] > 0)
