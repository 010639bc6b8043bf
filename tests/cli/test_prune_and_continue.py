"""The commands of docs/prune_and_continue.md do what it says, in its order in one directory."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/convert")]
from stories import NO_STORIES, STORIES  # noqa: E402
from warm_commands import run_warm  # noqa: E402

pytestmark = pytest.mark.slow

# fewer texts and steps than the page's: (of the page, here)
SHORTER = [("python - 1500", "python - 96"),
           ("train.epochs=1", "train.epochs=1 optimizer.warmup_steps=1"),
           ("--calibration data", "train.tokens=12K optimizer.warmup_tokens=4K "
            "train.global_batch=8 train.micro_batch=8 evaluate.batches=1 log.every=1 "
            "--calibration-samples 8 --calibration data")]
COMMAND = re.compile(r"python - (?P<words>\S+) <<'EOF'\n(?P<given>.*?)\nEOF$"
                     r"|python -c '(?P<short>.*?)'$"
                     r"|python (?P<script>[^\n]+)$|(?P<other>[^\n]+)$", re.S | re.M)


def commands() -> list[re.Match[str]]:
    """Every command of the page's bash blocks, shortened, continued lines joined."""
    page = (ROOT / "docs/prune_and_continue.md").read_text()
    for there, here in SHORTER:
        assert page.count(there) == 1, there
        page = page.replace(there, here)
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    return list(COMMAND.finditer("".join(blocks).replace("\\\n", " ")))


@pytest.mark.skipif(not STORIES.is_dir(), reason=NO_STORIES)
def test_commands(tmp_path):
    for name in ("megatron_spdf", "configs", "tools", "tests", "pretrain.py", "finetune.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
           "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "SPDF_DATA": str(STORIES.parent)}
    said = ""
    for number, command in enumerate(commands()):
        if given := command["given"] or command["short"]:
            script = tmp_path / f"given_{number}.py"
            script.write_text(given)
            words = [script, *filter(None, [command["words"]])]
        else:
            words = shlex.split(command["script"] or "")
        done = run_warm(words, tmp_path, env) if words else subprocess.run(
            ["bash", "-c", command["other"]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[0]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        said += done.stdout
    before, after = map(float, re.search(r"perplexity (\S+) before, (\S+) after", said).groups())
    assert before < after < 10 * before
    steps = [json.loads(line) for line in (tmp_path / "runs/half/log.jsonl").read_text().split("\n")
             if '"train"' in line]
    assert steps and all(
        step["loss"] == pytest.approx(0.5 * step["cross_entropy"] + 0.5 * step["distillation"])
        for step in steps)
    weights, masks = (load_file(tmp_path / "exported" / f"{name}.safetensors")
                      for name in ("model", "masks"))
    assert all(not torch.any(weights[name][~mask]) for name, mask in masks.items())
    assert sum((~m).sum() for m in masks.values()) / sum(
        m.numel() for m in masks.values()) == pytest.approx(0.5, abs=0.001)
