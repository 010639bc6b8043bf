"""launch/ and docker/ by their linters, and a look at a job before there is one. No cluster is
needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("launch/*.sh"))
BIN = Path(sys.executable).parent


@pytest.mark.slow
def test_shellcheck():
    scripts = [*SCRIPTS, *ROOT.glob("tests/slurm/*.sh")]
    done = subprocess.run([BIN / "shellcheck", "-x", "-P", "SCRIPTDIR", *scripts],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_hadolint():
    files = sorted(ROOT.glob("docker/Dockerfile*"))
    done = subprocess.run([BIN / "hadolint", *files], capture_output=True, text=True, check=False)
    assert len(files) == 2 and done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in ("common.sh", "site.sh")],
                         ids=lambda s: s.name)
def test_scripts_are_thin(script):
    assert os.access(script, os.X_OK)
    if script.name != "spdf.sh":
        assert len([line for line in script.read_text().splitlines() if line
                    and not line.startswith("#")]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script, words, said", [
    ("pretrain_gpt3xl.sh", ["--nodes=4", "sparsity=0.5", "parallel.tensor=4"],
     ["  level: 0.5", "32 ranks = tensor 4 x pipeline 1 x data 8", "GiB per GPU",
      "srun --ntasks=32", "--nodes=4"]),
    ("pretrain_gpt2small.sh", [], ["8 ranks = tensor 1 x pipeline 1 x data 8", "srun --ntasks=8"]),
    ("pretrain_gpt3_6b7.sh", [],
     ["64 ranks = tensor 4 + sequence x pipeline 1 x data 16", "srun --ntasks=64"]),
    ("pretrain_llama.sh", ["parallel.tensor=4"],
     ["16 ranks = tensor 4 x pipeline 1 x data 4", "architecture: llama", "srun --ntasks=16"]),
    ("pretrain_gpt3xl.sh", ["{root}/configs/pretrain/gpt3_xl_dense.yaml", "--ntasks-per-node=4"],
     ["output: runs/gpt3_xl_dense", "8 ranks ="]),
    ("evaluate.sh", ["e2e", "runs/a b", "--beams", "4"],
     ["tools/evaluate.py' 'runs/a b' '--task=e2e' '--beams' '4'"]),
])
def test_dry_run_shows_what_a_job_would_do(tmp_path, script, words, said):
    env = {**os.environ, "SPDF_PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in [n for n in env if n.startswith("SLURM_")]:
        del env[name]
    command = [ROOT / "launch" / script, *(w.format(root=ROOT) for w in words), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    for part in said:
        assert part in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("image, mounts, said", [
    ("/images/spdf.sqsh", "", "--container-mounts={root}:{root}"),
    ("/images/spdf.sqsh", "/data,/a:/b,{root}",
     "--container-mounts={root}:{root},/data:/data,/a:/b"),
    ("/images/spdf.sif", "/data", "--nv --bind={root} --bind={root} --bind=/data"),
])
def test_directories_are_mounted_once_each_under_their_own_names(image, mounts, said):
    """Started from the checkout, as docs/slurm.md shows it."""
    function = re.search(r"^contain\(\).*?^}", (ROOT / "launch/common.sh").read_text(),
                         re.M | re.S)[0]
    script = f'{function}\nflags=(); contain flags true; echo "${{flags[*]}} ${{CONTAINED[*]}}"'
    env = {**os.environ, "SPDF_ROOT": str(ROOT), "SPDF_CONTAINER": image, "SPDF_DEVICE": "gpu",
           "SPDF_MOUNTS": mounts.format(root=ROOT)}
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=True)
    assert f"{said.format(root=ROOT)} " in done.stdout, done.stdout


def test_every_setting_is_documented():
    page = (ROOT / "docs/slurm.md").read_text()
    for name in set(re.findall(r"\bSPDF_[A-Z_]+",
                               (ROOT / "launch/common.sh").read_text())) - {"SPDF_ROOT"}:
        assert name in page, name
    for script in SCRIPTS:
        assert script.name in page, script.name
