"""tools/benchmark.py kernels: what it measures, not how fast it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
KINDS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def test_every_kernel_of_a_layer_is_measured(tmp_path):
    out = tmp_path / "kernels.json"
    done = subprocess.run([sys.executable, "tools/benchmark.py", "kernels", "--seconds", "1e-3",
                           "--output", str(out)],
                          cwd=ROOT, capture_output=True, text=True, check=False,
                          env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "",
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout and "dense over tiles" in done.stdout
    found = json.loads(out.read_text())
    names = ["expand", "compress", "tiles, forward", "tiles, input gradient",
             "tiles, weight gradient"]
    assert [(f["kernel"], f["weight"].split(".")[-2]) for f in found["figures"]] == [
        (name, kind) for kind in KINDS for name in names]
    for f in found["figures"]:
        assert f["seconds"] > 0.0 and f["floor"] > 0.0 and f["sparsity"] == 0.75
        assert (f["dense"] is None) == (f["kernel"] in ("expand", "compress"))


@pytest.mark.parametrize(("words", "said"), [
    (("kernels", "nowhere.yaml"), "there is no recipe"),
    (("tiles",), "it is torch that computes; run it on a machine with a GPU"),
    (("kernels", "train.micro_batch=auto"), "a benchmark is of one, give train.micro_batch=N"),
])
def test_what_cannot_be_measured_is_refused(words, said):
    done = subprocess.run([sys.executable, "tools/benchmark.py", *words], cwd=ROOT,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and said in done.stderr
