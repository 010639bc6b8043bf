"""Invariant 9: bad input ends with one readable message and exit code 2, before a file is written
or a device touched."""

import shutil

import pytest

pytestmark = pytest.mark.slow  # starts commands


def refused(process, workplace, output="refused"):
    """The message of a start that must fail."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err
    assert not (workplace / output).exists()
    return err


@pytest.fixture
def damaged(workplace, tmp_path):
    """Copies of the training data to damage; returns (directory, prefix)."""
    shutil.copytree(workplace / "data", tmp_path / "data")
    return tmp_path / "data", f"data.train={tmp_path}/data/train"


@pytest.mark.parametrize(("words", "said"), [
    (["optimizer.zzz=1"], ["unknown key optimizer.zzz", "known: "]),
    (["optimizer.bata1=0.9"], ["did you mean optimizer.beta1?"]),
    (["log.wandb=a/b/c"], ["log.wandb='a/b/c'", "TEAM/PROJECT"]),
    (["sparsity=1.0"], ["sparsity.level=1.0", "less than 1"]),
    (["parallel.tensor=3"], ["model.query_groups=4", "parallel.tensor=3", "[1, 2, 4]"]),
    (["parallel.pipeline=3"], ["model.layers=2", "[1, 2]"]),
    (["train.global_batch=6"], ["train.global_batch=6", "4 or 8"]),
    (["train.sequence_length=64"], ["train.sequence_length=64", "model.max_positions=32"]),
    (["sparsity=[{weights: '*.attention.*', level: 0.5}]"], ["'*.attention.*'", "linear_qkv"]),
    (["sparsity=[{weights: 'embedding.*', level: 0.5}]"], ["stay dense", "remove it"]),
    (["model.vocab_size=50257"], ["model.vocab_size=50257", "set model.vocab_size=300"]),
    (["data.train=data/nothing"], ["data/nothing", "tools/preprocess_data.py"]),
    (["train.global_batch=4096"], ["validation data hold", "train.global_batch=4096"]),
    (["parallel.data=2"], ["needs 2 processes", "python started 1", "torchrun", "parallel.data=1"]),
])
def test_recipe_and_layout(ask, workplace, words, said):
    message = refused(ask("output=refused", *words), workplace)
    for part in said:
        assert part in message


def test_truncated_data(ask, workplace, damaged):
    directory, word = damaged
    (directory / "train.bin").write_bytes((directory / "train.bin").read_bytes()[:-100])
    message = refused(ask("output=refused", word), workplace)
    assert "train.bin" in message and "bytes" in message


def test_missing_index(ask, workplace, damaged):
    directory, word = damaged
    (directory / "train.idx").unlink()
    assert "train.idx" in refused(ask("output=refused", word), workplace)


@pytest.mark.slow
def test_ids_that_no_token_has_end_all_ranks_alike(start, workplace, damaged):
    """A data set with a manifest is not read before the ranks start."""
    directory, word = damaged
    size = (directory / "train.bin").stat().st_size
    (directory / "train.bin").write_bytes(b"\xff\xff" * (size // 2))
    process = start(f"output={directory / 'run'}", word, "parallel.data=2", ranks=2)
    err = refused(process, workplace)
    assert f"{directory}/train.bin, token " in err
    assert "id 65535, and the tokenizer has the ids 0 to 299; name the tokenizer" in err


def test_a_directory_that_is_no_run(start, workplace):
    (workplace / "mine").mkdir(exist_ok=True)
    (workplace / "mine" / "thesis.txt").write_text("keep me")
    process = start("output=mine")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "not a run directory" in err
    assert [p.name for p in (workplace / "mine").iterdir()] == ["thesis.txt"]


def test_missing_recipe(start, workplace):
    assert "there is no recipe" in refused(start(recipe="nowhere.yaml"), workplace)


@pytest.mark.parametrize("word", ["output=refused", "--help"])
def test_a_plugin_that_is_not_on_the_path(start, workplace, word):
    err = refused(start(word, SPDF_PLUGINS="nowhere"), workplace)
    assert "SPDF_PLUGINS names 'nowhere'" in err and "on PYTHONPATH" in err
