import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]

RECIPE = {
    "seed": 3,
    "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab_size": 300, "max_positions": 32},
    "sparsity": 0.75,
    "train": {"tokens": 8 * 32 * 24, "global_batch": 8, "micro_batch": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-3, "warmup_tokens": 512},
    "evaluate": {"every": 6, "batches": 2},
    "checkpoint": {"every": 8},
    "log": {"every": 1},
}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A directory with data/train and data/valid, made by the tool from real text, and recipe.yaml."""
    place = tmp_path_factory.mktemp("workplace")
    library = Path(sysconfig.get_paths()["stdlib"])
    (place / "text").mkdir()
    for name in ("argparse", "ast", "calendar", "datetime"):
        record = {"text": (library / f"{name}.py").read_text()}
        (place / "text" / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    tool = [sys.executable, "-W", "ignore", str(ROOT / "tools/preprocess_data.py"), "--tokenizer", "tokenizer"]
    make = ["--train-tokenizer", "bpe", "--vocab-size", "300"]
    for inputs, output, extra in (("text/[a-b]*.jsonl", "data/train", make), ("text/c*.jsonl", "data/valid", [])):
        subprocess.run([*tool, "--input", inputs, "--output", output, *extra], cwd=place, check=True)
    recipe = RECIPE | {"output": "run", "data": {"train": "data/train", "valid": "data/valid", "workers": 0}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture(scope="session")
def start(workplace):
    """Starts pretrain.py in the workplace on some ranks (torchrun), or as one plain process."""
    def start(*words: str, ranks: int = 0, recipe: str = "recipe.yaml", **environment: str) -> subprocess.Popen:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks else []
        command = [sys.executable, *launch, str(ROOT / "pretrain.py"), recipe, *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
               "CUDA_VISIBLE_DEVICES": "", **environment}
        return subprocess.Popen(command, cwd=workplace, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)
    return start
