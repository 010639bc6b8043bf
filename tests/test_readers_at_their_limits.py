"""What a reader may read at most is read, and one more is refused by the limit's figure."""

from __future__ import annotations

import importlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.pickles import read_pickle
from megatron_spdf.checkpoint.safe_index import read_index
from megatron_spdf.checkpoint.torch_file import read_file
from megatron_spdf.checkpoint.writer import StoredTensor, whole, write_tensors
from megatron_spdf.convert.foreign import place_of, read_word
from megatron_spdf.data.finetuning.files import json_file
from megatron_spdf.data.preprocess.records import ReadReport, read_records
from megatron_spdf.recipe.load import make_recipe
from megatron_spdf.records.json_reader import json_lines, parse_json, read_json
from megatron_spdf.records.yaml_reader import parse_yaml, read_yaml
from megatron_spdf.runs.loss_table import read_table

# a function that reads something of `n` units in a directory that it may write to
Reader = Callable[[int, Path], object]


def of_bytes(read: Callable[[Path], object], form: Callable[[int], str]) -> Reader:
    """Reads a file of n bytes."""
    def run(n: int, directory: Path) -> object:
        path = directory / "file"
        path.write_text(form(n))
        assert path.stat().st_size == n
        return read(path)
    return run


def text(n: int) -> str:
    return f'"{"x" * (n - 2)}"'


def table(n: int) -> str:
    return "x" * n


def nothing_wrong_but(said: str, read: Callable[..., object]) -> Callable[..., object]:
    """A reader that finds another fault with what is small enough."""
    def run(*arguments) -> object:
        try:
            return read(*arguments)
        except ValueError as error:
            if said not in str(error):
                raise
            return None
    return run


def pickled_opcodes(n: int, _: Path) -> object:
    """A pickle of n operations: the protocol, True many times, the end."""
    return read_pickle(io.BytesIO(b"\x80\x04" + b"\x88" * (n - 2) + b"."), ())


def pickled_marks(n: int, _: Path) -> object:
    return read_pickle(io.BytesIO(b"\x80\x04" + b"(" * n + b"t" * n + b"."), ())


def index_of_a_checkpoint(n: int, directory: Path) -> object:
    write_tensors(directory, [StoredTensor("w", (2,), torch.float32, whole((2,)),
                                           lambda: torch.ones(2))])
    path = directory / ".metadata"
    content = path.read_bytes()
    path.write_bytes(content + b" " * (n - len(content)))  # behind its end
    return read_index(directory)


def index_of(directory: Path, name: str, shape: tuple[int, ...]) -> object:
    directory.mkdir()
    write_tensors(directory, [StoredTensor(name, shape, torch.float32, whole(shape),
                                           lambda: torch.ones(shape))])
    return read_index(directory)


def record_of_torch_save(n: int, directory: Path) -> object:
    """A file whose pickle has n bytes."""
    path = directory / "file"
    torch.save("x" * (n - len(pickle.dumps("x" * 300, 2)) + 300), path)
    return read_file(path)


def listed_file(n: int, directory: Path) -> object:
    partial = directory / "step_00000001.partial"
    partial.mkdir()
    (partial / "run.json").write_bytes(b" " * n)
    return store.verify(store.complete(partial, {"run.json": store.describe(partial / "run.json")}))


def long_record(n: int, directory: Path) -> object:
    """A record, its line end counted, of n times the 10 bytes from where on one is left out."""
    report = ReadReport()
    path = directory / "file.jsonl"
    path.write_bytes(b"x" * (n * 10 - 1) + b"\n1\n")
    found = list(read_records(path, "skip", report, 10))
    if not found:
        raise ValueError(report.skipped_lines[0].reason)
    return found


def override(n: int, _: Path) -> object:
    """An override whose key has n parts."""
    return make_recipe({}, [".".join(["train"] * n) + "=1"], "recipe")


CASES: dict[str, tuple[str, int, Reader, str]] = {
    "JSON": ("records.limits.MOST_BYTES", 100, of_bytes(read_json, text), "over 100 bytes long"),
    "YAML": ("records.limits.MOST_YAML_BYTES", 100, of_bytes(read_yaml, text),
             "over 100 bytes long"),
    "a line": ("records.limits.MOST_LINE_BYTES", 100, of_bytes(
        lambda path: list(json_lines(path)), text), "over 100 bytes long"),
    "values of JSON": ("records.limits.MOST_VALUES", 10, lambda n, _: parse_json(
        f"[{','.join(['1'] * n)}]"), "over 10 values"),
    "values of YAML": ("records.limits.MOST_YAML_VALUES", 10, lambda n, _: parse_yaml(
        f"[{','.join(['1'] * (n - 1))}]"), "over 10 values"),
    "nesting of YAML": ("records.limits.MOST_NESTING", 10, lambda n, _: parse_yaml(
        "[" * (n - 1) + "1" + "]" * (n - 1)), "nested more than 10 deep"),
    "nesting of JSON": ("records.limits.MOST_NESTING", 10, lambda n, _: parse_json(
        "[" * n + "]" * n), "nested more than 10 deep"),
    "parts of a key": ("recipe.load.MOST_NESTING", 5, nothing_wrong_but("output", override),
                       "has over 5 parts"),
    "a data set": ("data.finetuning.files.MOST_BYTES", 100, of_bytes(json_file, text),
                   "over 100 bytes long"),
    "a table of losses": ("tables.MOST_CSV_BYTES", 100, of_bytes(
        nothing_wrong_but("column", read_table), table), "over 100 bytes long"),
    "a word": ("convert.foreign._MOST_WORD", 20, of_bytes(read_word, table), "more than 20 bytes"),
    "operations": ("checkpoint.pickles._MOST_OPCODES", 20, pickled_opcodes, "more than 20 opcodes"),
    "marks": ("checkpoint.pickles._MOST_MARKS", 20, pickled_marks, "nested deeper than 20"),
    "an index": ("checkpoint.safe_index.MOST_BYTES", 5000, index_of_a_checkpoint,
                 "more than 5,000 bytes"),
    "a record": ("checkpoint.torch_file.MOST_BYTES", 500, record_of_torch_save,
                 "more than 500 bytes"),
    "a file without tensors": ("checkpoint.store._MOST_BYTES", 50, listed_file,
                               "no such file has more than 50"),
    "a long record": ("data.preprocess.records._MOST_TIMES", 3, long_record,
                      "3 times the limit of 10"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_most_is_read_and_one_more_refused(tmp_path, monkeypatch, name):
    place, most, read, said = CASES[name]
    module, _, limit = place.rpartition(".")
    module = importlib.import_module(f"megatron_spdf.{module}")
    assert hasattr(module, limit)
    monkeypatch.setattr(module, limit, most)
    (tmp_path / "most").mkdir()
    read(most, tmp_path / "most")
    (tmp_path / "more").mkdir()
    with pytest.raises(Exception, match=said):
        read(most + 1, tmp_path / "more")


def test_names_of_tensors_and_files_may_be_long_and_not_longer(tmp_path):
    assert list(index_of(tmp_path / "long", "w" * 1000, (2,))) == ["w" * 1000]
    with pytest.raises(ValueError, match="has a tensor of the name 'www"):
        index_of(tmp_path / "longer", "w" * 1001, (2,))
    assert place_of(tmp_path, "x" * 255, tmp_path).name == "x" * 255
    with pytest.raises(ValueError, match="which is no file beside it"):
        place_of(tmp_path, "x" * 256, tmp_path)


def test_tensors_have_eight_axes_and_no_more(tmp_path):
    index_of(tmp_path / "eight", "w", (1,) * 8)
    with pytest.raises(ValueError, match="something else in place of whole numbers"):
        index_of(tmp_path / "nine", "w", (1,) * 9)
    torch.save(torch.ones((1,) * 8), tmp_path / "eight.pt")
    assert read_file(tmp_path / "eight.pt").shape == (1,) * 8
    torch.save(torch.ones((1,) * 9), tmp_path / "nine.pt")
    with pytest.raises(ValueError):
        read_file(tmp_path / "nine.pt")


def test_reading_goes_on_behind_the_most_skipped_lines_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_spdf.data.preprocess.records.MAX_RECORDED_SKIPS", 3)
    report, path = ReadReport(), tmp_path / "file.jsonl"
    path.write_bytes(b"x" * 11 + b"\n" + b"".join(b"y" * 11 + b"\n" for _ in range(4)) + b"1\n")
    found = list(read_records(path, "skip", report, 10))
    assert [record.strip() for _, record in found] == [b"1"] and report.skipped == 5
    assert [json.loads(str(s.line)) for s in report.skipped_lines] == [1, 2, 3]
