"""Every file is written by `megatron_spdf/files.py`, and none into a checkpoint.

The code of package and tools is read for whatever else writes.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from megatron_spdf import files
from megatron_spdf.checkpoint import store
from megatron_spdf.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for place in ("megatron_spdf", "tools")
               for path in (ROOT / place).rglob("*.py")) + ["pretrain.py", "finetune.py"]
# Calls that write to a path, whatever their arguments.
WRITING = {"write_text", "write_bytes", "touch", "tofile", "copyfile", "copy2", "copytree", "link",
           "symlink", "symlink_to", "hardlink_to", "save_pretrained", "save_file", "SummaryWriter",
           "FileSystemWriter", "save_config", "open_memmap", "savez", "savetxt",
           "NamedTemporaryFile"}
# Calls that write to a path or to an open file, which has one of these names.
EITHER = {"save": {"np", "torch"}, "savefig": set()}
OPEN = {"file", "picture", "text", "buffer", "checkpointer", "history"}
# Libraries that write by themselves, into a directory that has just been made under a name of ours.
LIBRARIES = {
    ("megatron_spdf/checkpoint/saving.py", "FileSystemWriter"),
    ("megatron_spdf/checkpoint/saving.py", "save_config"),
    ("megatron_spdf/checkpoint/writer.py", "FileSystemWriter"),
    ("megatron_spdf/convert/huggingface_export.py", "save_pretrained"),
    # `RunDir.check` looks at its directory
    ("megatron_spdf/runs/writers/tensorboard.py", "SummaryWriter"),
    # to places of their own making
    ("tools/golden_place.py", "copytree"), ("tools/demo_parts/corpus.py", "open"),
}


def writes(node: ast.Call) -> str:
    """Name of the call where it writes to a path, else empty."""
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    words = [a.value for a in (*node.args, *(k.value for k in node.keywords))
             if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(
        called.value, ast.Name) else ""
    if name in WRITING and owner != "os":
        return name
    if name in ("open", "memmap", "fdopen") and owner != "os" and any(
            set(word) <= set("rwaxbt+") and set(word) & set("wax+") for word in words):
        return name
    if name == "savefig" or name == "save" and owner in EITHER["save"]:
        target = node.args[0 if name == "savefig" or owner == "np" else 1]
        return "" if isinstance(target, ast.Name) and target.id in OPEN else name
    if owner == "os" and name == "open" and any(
            getattr(part, "attr", "").startswith("O_") and part.attr in ("O_WRONLY", "O_RDWR",
                                                                         "O_CREAT")
            for part in ast.walk(node)):
        return "os.open"
    return ""


def found(code: str) -> list[str]:
    return [name for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Call) and (name := writes(node))]


@pytest.mark.parametrize("path", FILES)
def test_nothing_else_writes_files(path):
    if path == "megatron_spdf/files.py":
        assert found((ROOT / path).read_text())
        return
    assert {(path, name) for name in found((ROOT / path).read_text())} <= LIBRARIES


@pytest.mark.parametrize("code", [
    'open(p, "w")', 'open(p, mode="ab")', 'p.open("x")', 'zstd.open(p, "wt")', 'p.write_text("")',
    'np.save(p / "a.npy", a)', "torch.save(a, path)", "figure.savefig(path)", "p.touch()",
    "os.open(p, os.O_WRONLY | os.O_CREAT)", 'np.memmap(p, "u1", "w+")', "shutil.copytree(a, b)",
    "SummaryWriter(p)", 'tokenizer.save_pretrained(p)'])
def test_what_writes_is_seen(code):
    assert found(code)


@pytest.mark.parametrize("code", ['open(p)', 'p.open("rb")', "np.save(file, a)", "x.copy()",
                                  'text.replace("a", "w")', "os.open(p, os.O_RDONLY)"])
def test_what_reads_is_not(code):
    assert not found(code)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A complete checkpoint of a run, which is also known by a link."""
    made = tmp_path / "runs/mine/checkpoints/step_00000002"
    made.mkdir(parents=True)
    for name in ("run.json", "files.json"):
        (made / name).write_text("{}")
    (tmp_path / "latest").symlink_to(made)
    return made


@pytest.mark.parametrize("place", ["", "evaluation", "a/b"])
@pytest.mark.parametrize("write", [
    lambda path: files.write_file(path, "x"), files.new_file, files.open_to_append,
    lambda path: files.atomic_directory(path).__enter__()],
    ids=["write", "new", "append", "directory"])
def test_nothing_is_added_to_a_checkpoint_by_whatever_path(checkpoint, tmp_path, place, write,
                                                           monkeypatch):
    monkeypatch.chdir(checkpoint)
    for named in (checkpoint, tmp_path / "latest", Path("."), checkpoint / "x/.."):
        with pytest.raises(ValueError, match="lies in the checkpoint .*step_00000002, to which"):
            write(named / place / "scores.json")
    assert sorted(path.name for path in checkpoint.iterdir()) == ["files.json", "run.json"]


def test_a_run_is_not_put_into_a_checkpoint(checkpoint, recipe, tmp_path):
    for output in (checkpoint / "run", tmp_path / "latest/run", checkpoint):
        with pytest.raises(ValueError, match="lies in the checkpoint"):
            RunDir(recipe(output=str(output))).check()


def test_the_run_of_a_checkpoint_is_found_by_whatever_path(checkpoint, tmp_path, monkeypatch):
    run = tmp_path / "runs/mine"
    assert store.run_of(checkpoint) == store.run_of(tmp_path / "latest") == run
    assert store.run_of(run) == run and store.run_of(tmp_path) == tmp_path
    monkeypatch.chdir(checkpoint)
    assert store.run_of(Path(".")) == run
    moved = checkpoint.rename(tmp_path / "moved")
    checkpoint.symlink_to(moved)
    assert store.run_of(checkpoint) == run
    assert store.run_of(moved) is None


def test_an_output_in_a_run_is_not_reached_by_a_link_that_leads_out(tmp_path):
    (tmp_path / "run").mkdir()
    assert files.inside(tmp_path / "run", "evaluation/e2e") == tmp_path / "run/evaluation/e2e"
    (tmp_path / "run/evaluation").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="a link that leads to .*victim"):
        files.inside(tmp_path / "run", "evaluation/e2e")


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, kind):
    path = Path("/dev/null") if kind == "device" else tmp_path / "there"
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "device": lambda: None}[kind]()
    with pytest.raises(ValueError, match="is no ordinary file"):
        files.write_file(path, "x")
    assert not path.is_file()


def test_an_evaluation_goes_to_the_run_and_not_into_the_checkpoint(checkpoint, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    scores = tmp_path / "runs/mine/evaluation/e2e_test/scores.json"
    scores.parent.mkdir(parents=True)
    scores.touch()
    for words, said in (([], f"{scores} exists"),
                        (["--output", str(checkpoint / "scores")], "lies in the checkpoint")):
        try:
            assert tool.main([str(tmp_path / "latest"), "--task", "e2e", *words]) == 2
        except SystemExit as end:
            assert end.code == 2
        assert said in capsys.readouterr().err
