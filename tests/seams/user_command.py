"""Commands of the project, as a user starts them who has a tenant's directory on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from warm_commands import run_warm  # noqa: E402


def run_with(place: Path, script: str, *words: str, plugins: str) -> subprocess.CompletedProcess:
    """Runs a script in a directory, with the modules `plugins` imported by name."""
    path = os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))
    env = {**os.environ, "SPDF_PLUGINS": plugins, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore",
           "CUDA_VISIBLE_DEVICES": ""}
    return run_warm([ROOT / script, *words], place, env)
