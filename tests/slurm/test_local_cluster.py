"""The cluster of these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from local_cluster import HERE, install_slurm

pytestmark = pytest.mark.slow


def test_a_cluster_ends_with_its_owner_however_that_ends():
    if why := install_slurm():
        pytest.skip(why)
    state, owner = tempfile.mkdtemp(prefix="spdf_"), subprocess.Popen(["sleep", "600"])
    script = ["bash", str(HERE / "local_slurm.sh")]
    env = {**os.environ, "LOCAL_SLURM_DIR": state, "LOCAL_SLURM_OWNER": str(owner.pid)}
    try:
        subprocess.run([*script, "start", "1"], env=env, check=True, timeout=120)
        daemons = {file.stem: psutil.Process(int(file.read_text().split()[0]))
                   for file in Path(state, "run").glob("*.pid")}
        assert {"munged", "slurmctld", "node1"} < daemons.keys()
        owner.kill()
        owner.wait()
        assert not psutil.wait_procs(daemons.values(), timeout=60)[1]
    finally:
        owner.kill()
        subprocess.run([*script, "stop"], env=env, check=True, timeout=120)
        shutil.rmtree(state)
