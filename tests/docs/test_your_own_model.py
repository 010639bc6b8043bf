"""docs/your_own_model.md: preprocessing, recipe and plan as they stand there; the recipe is
extended from where the page says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from pages import ALL, ROOT, commands

sys.path.insert(0, str(ROOT / "tests"))
from warm_commands import run_warm  # noqa: E402

pytestmark = pytest.mark.slow

RUN = [block for block in ALL if block.page == "docs/your_own_model.md" and block.mark == "run"]


def test_commands(tmp_path):
    for name in ("megatron_spdf", "configs", "launch", "tools", "pretrain.py", "finetune.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text() for path in sorted(library.glob("[a-c]*.py"))]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/library.jsonl").write_text("".join(json.dumps({"text": text}) + "\n"
                                                         for text in texts))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT), "SPDF_PYTHON": sys.executable}
    said = []
    for block in RUN:
        text = block.text.replace("32768", "512")  # a tokenizer takes a minute else
        if block.language == "yaml":
            (tmp_path / text.split()[1]).write_text(text)
            continue
        for words in commands(text):
            done = (run_warm(words[1:], tmp_path, env) if words[0] == "python" else subprocess.run(
                words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False))
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
            said.append(done.stdout)
    assert (tmp_path / "data/mine/train.bin").stat().st_size > 0
    assert (tmp_path / "data/mine/valid.bin").stat().st_size > 0
    _, dry, planned, job, chain = said
    assert "vocab_size: 512" in dry and "sparsity 75.0000%" in dry
    assert "8 x H100" in planned and "layouts fit" in planned
    assert "srun --ntasks=8" in job and "parallel.data=auto" in job
    scripts = [Path(word).name for line in chain.splitlines() for word in shlex.split(line)
               if word.endswith(".sh")]
    assert scripts == ["tool.sh", "pretrain_gpt2small.sh", "finetune.sh", "evaluate.sh", "tool.sh"]
