import importlib
import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from forked_ranks import FORKED

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_corpus import make_corpus  # noqa: E402
from warm_commands import Warm  # noqa: E402

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
    """A directory with data/train and data/valid, made by the tool from real text, and
    recipe.yaml."""
    place = tmp_path_factory.mktemp("workplace")
    make_corpus(place)
    recipe = RECIPE | {"output": "run",
                       "data": {"train": "data/train", "valid": "data/valid", "workers": 0}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture(scope="session")
def start(workplace):
    """Starts pretrain.py in the workplace, on some ranks or as one plain process; by a launcher
    other than the usual one, or none, in an interpreter of its own."""
    def start(*words: str, ranks: int = 0, recipe: str = "recipe.yaml",
              launcher: tuple[str, ...] = FORKED,
              **environment: str) -> subprocess.Popen | Warm:
        launch = [*launcher, str(ranks)] if ranks else []
        command = [*launch, str(ROOT / "pretrain.py"), recipe, *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
               "CUDA_VISIBLE_DEVICES": "", **environment}
        if launcher == FORKED:
            return Warm(command, workplace, env)
        return subprocess.Popen([sys.executable, *command], cwd=workplace, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


class Ended:
    """What an entry script says and returns that ends before it joins other ranks, like a process
    that has ended; run in this one, since a process takes seconds to import PyTorch."""

    def __init__(self, script: str, words: tuple[str, ...], place: Path):
        sys.path.insert(0, str(ROOT))
        main = importlib.import_module(script).main
        self.out, self.err = io.StringIO(), io.StringIO()
        with chdir(place), patch.object(sys, "argv",
                                        [f"{script}.py", *words]), redirect_stdout(self.out), \
                redirect_stderr(self.err):
            try:
                self.returncode = main()
            except SystemExit as end:
                self.returncode = end.code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        return self.out.getvalue(), self.err.getvalue()


@pytest.fixture(scope="session")
def ask(workplace):
    """pretrain.py in the workplace, which must refuse or only print."""
    def ask(*words: str, recipe: str = "recipe.yaml") -> Ended:
        return Ended("pretrain", (recipe, *words), workplace)
    return ask


@pytest.fixture(scope="session")
def ask_tune(workplace):
    """The same with finetune.py."""
    def ask(*words: str) -> Ended:
        return Ended("finetune", ("tune.yaml", *words), workplace)
    return ask
