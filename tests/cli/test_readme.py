"""The commands of the README do what it says, run in its order in one directory; so does its
Python."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def readme_commands() -> list[str]:
    """Every command of the README's bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout with the text that the README's commands expect."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("megatron_spdf", "configs", "tools", "pretrain.py", "finetune.py"):
        (place / name).symlink_to(ROOT / name)
    library = Path(sysconfig.get_paths()["stdlib"])
    for directory, modules in (("text", "abcde"), ("held_out", "wxyz")):
        (place / directory).mkdir()
        texts = [p.read_text() for p in sorted(library.glob("*.py")) if p.name[0] in modules]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (place / directory / "library.jsonl").write_text("".join(lines))
    (place / "pairs").mkdir()
    for split, names in (("train", "abcdefgh"), ("validation", "ij")):
        pairs = [{"context": f"import {p.stem}", "completion": f"# {p.name}"}
                 for p in sorted(library.glob("*.py"))
                 if p.name[0] in names]
        (place / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n"
                                                                for pair in pairs))
    return place


def test_commands(copy):
    commands = readme_commands()
    made = {line.split()[1] for line in commands if line.startswith("make ")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert made == {"demo", "test", "test-fast"} and made <= targets
    others = [line for line in commands if not line.startswith("make ")]
    assert len(others) >= 6
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
           "CUDA_VISIBLE_DEVICES": ""}
    outputs = {}
    for command in others:
        done = subprocess.run(["bash", "-c", command], cwd=copy, env=env, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs[command] = done.stdout
    (resumed,) = [out for command, out in outputs.items() if "parallel.data=2 output" in command]
    assert "resumed from step_000000" in resumed and "tensor 1 x pipeline 1 x data 2" in resumed


def test_python(copy):
    marked = r"<!-- run: tests/cli/test_readme.py -->\n```python\n(.*?)```"
    blocks = re.findall(marked, (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1 and len(blocks[0].splitlines()) == 5
    check = """
layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
assert [int((layer.weight != 0).sum()) for layer in layers] == [64 * 256 // 4, 256 * 8 // 4]
assert [tuple(layer.weight.shape) for layer in layers] == [(256, 64), (8, 256)]
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocks[0] + check], cwd=copy,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_every_recipe_in_the_table_exists():
    table = set(re.findall(r"`([a-z0-9_{},]+\.yaml)`", (ROOT / "README.md").read_text()))
    named = set()
    for name in table:
        found = re.search(r"\{(.*?)\}", name)
        named |= {name.replace(found[0], part) for part in found[1].split(",")} if found else {name}
    assert {p.name for p in (ROOT / "configs/pretrain").glob("*.yaml")} == named - {"recipe.yaml"}
