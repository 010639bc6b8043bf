"""sbatch launch/*.sh on a real cluster: to the end, through every kind of interruption, and not for ever."""

from __future__ import annotations

import pytest
from conftest import records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(cluster):
    """An undisturbed run on two nodes."""
    job = cluster.sbatch("pretrain_gpt3xl.sh", "recipe.yaml", "output=straight")
    assert cluster.end_of(job) == ["COMPLETED 0"], cluster.output(job)
    return cluster.output(job), records(cluster.place / "straight")


def test_the_happy_path(straight):
    out, log = straight
    assert [r["step"] for r in log if r["kind"] == "train"] == list(range(1, 25))
    for said in ("2 ranks", "data 2", "node1: rank 0, cpu", "node2: rank 1, cpu", "clock"):
        assert said in out
