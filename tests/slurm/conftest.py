"""The fixture of the cluster."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import yaml
from local_cluster import HERE, RECIPE, ROOT, Cluster, install_slurm
from small_corpus import make_corpus


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes, a copy of the repository's tree and a corpus; ended with the session."""
    if why := install_slurm():
        pytest.skip(why)
    place = tmp_path_factory.mktemp("slurm") / "work place"
    place.mkdir()
    state = tempfile.mkdtemp(prefix="spdf_")
    env = {**os.environ, "LOCAL_SLURM_DIR": state, "SLURM_CONF": f"{state}/slurm.conf",
           "LOCAL_SLURM_OWNER": str(os.getpid()),
           "SPDF_DEVICE": "cpu",
           "SPDF_PYTHON": str(place / "python"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
           "SPDF_EXIT_GRACE_SECONDS": "20"}
    for name in [n for n in env if n.startswith(("SLURM_", "SBATCH_")) and n != "SLURM_CONF"]:
        del env[name]
    (place / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore '
                                  f'"{HERE / "faults.py"}" "$@"\n')
    (place / "python").chmod(0o755)
    root = place / "check out"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("site.sh"))
    for name in ("megatron_spdf", "configs", "tools", "pretrain.py", "finetune.py"):
        (root / name).symlink_to(ROOT / name)
    (place / "recipe.yaml").write_text(yaml.safe_dump({"output": "run", **RECIPE}))
    make_corpus(place)
    here = Cluster(place, root, env)
    try:
        here.local("start", "3")
        yield here
    finally:
        here.run("scancel", "--user=root", check=False)
        here.local("stop")
        shutil.rmtree(state, ignore_errors=True)
