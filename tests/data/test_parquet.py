"""Parquet as input of preprocessing: the data set is that of the same documents as JSON lines, and
what cannot be read is named by its row."""

from __future__ import annotations

import importlib.util
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from text_shards import as_jsonl, records, write_shard

from megatron_spdf.data.preprocess import incremental
from megatron_spdf.data.preprocess.documents import (
    ReadReport,
    expand_inputs,
    iterate_documents,
    read_shard,
)
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ITEMS = records(300)
TEXT_TYPES = {
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(),
    "binary": pa.binary(), "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def write(path: Path, items: list[dict], text: pa.DataType | None = None, **options) -> Path:
    """A file of the records, in several row groups; columns of JSON's types are nested."""
    table = pa.Table.from_pylist(items)
    if text is not None:
        column = pa.array([item["text"] for item in items], pa.binary() if text == pa.binary()
                          else pa.string())
        column = column.dictionary_encode() if pa.types.is_dictionary(text) else column.cast(text)
        table = table.set_column(table.schema.get_field_index("text"), "text", column)
    pq.write_table(table, path, **{"row_group_size": 70, **options})
    return path


def documents(path: Path, **options) -> list[tuple]:
    return [(d.text, d.meta) for d in iterate_documents([path], **options)]


def files_of(prefix: Path) -> dict[str, bytes]:
    """Files of the data sets under a prefix, without manifests, which name the inputs."""
    return {str(path.relative_to(prefix.parent)): path.read_bytes()
            for path in sorted(prefix.parent.rglob("*")) if path.suffix in (".bin", ".idx")}


@pytest.mark.parametrize("text", TEXT_TYPES)
def test_documents_are_those_of_json_lines(tmp_path, text):
    path = write(tmp_path / "a.parquet", ITEMS, TEXT_TYPES[text])
    lines = write_shard(tmp_path / "a.jsonl", ITEMS)
    report = ReadReport()
    assert documents(path, report=report) == documents(lines)
    assert (report.seen, report.documents) == (300, 300)
    assert report.bytes_read == path.stat().st_size


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_of_any_compression(tmp_path, compression):
    assert documents(write(tmp_path / "a.parquet", ITEMS, compression=compression)) == [
        (item["text"], item["meta"]) for item in ITEMS]


@pytest.mark.parametrize(("settings", "workers"), [
    ({}, 1), ({"deduplicate": True, "split": (90.0, 10.0)}, 1), ({"set_key": "pile_set_name"}, 1),
    pytest.param({}, 2, marks=pytest.mark.slow)])
def test_the_data_set_is_that_of_the_same_json_lines(tmp_path, tiny_bpe, settings, workers):
    made = {}
    for kind, save in ((".parquet", write), (".jsonl", write_shard)):
        place = tmp_path / kind[1:]
        place.mkdir()
        inputs = [save(place / f"{n}{kind}", ITEMS[n * 100: n * 100 + 100]) for n in range(3)]
        preprocess(inputs, place / "out", load_tokenizer(tiny_bpe), workers=workers, **settings)
        made[kind] = files_of(place / "out")
    assert made[".parquet"] == made[".jsonl"] and made[".jsonl"]


def test_a_set_may_be_a_column_of_its_own(tmp_path, tiny_bpe):
    flat = [{"text": item["text"], "source": "ab"[n % 2]} for n, item in enumerate(ITEMS)]
    manifest = preprocess([write(tmp_path / "a.parquet", flat)], tmp_path / "out",
                          load_tokenizer(tiny_bpe), set_key="source")
    assert {name: counts.documents for name, counts in manifest.data_sets.items()} == {
        "a": 150, "b": 150}


def test_an_interrupted_run_goes_on_after_its_finished_inputs(tmp_path, tiny_bpe, monkeypatch):
    monkeypatch.setattr(incremental, "_SYNC_BYTES", 1)
    good = [write(tmp_path / f"{n}.parquet", ITEMS[n * 100: n * 100 + 100]) for n in range(2)]
    bad = tmp_path / "2.parquet"
    bad.write_bytes(b"PAR1 cut off")
    tokenizer = load_tokenizer(tiny_bpe)
    with pytest.raises(ValueError, match=r"2.parquet, row 1: damaged or cut off"):
        preprocess([*good, bad], tmp_path / "out", tokenizer)
    assert (tmp_path / "out.partial/ledger.jsonl").read_bytes().count(b"\n") == 2
    write(bad, ITEMS[200:])
    preprocess([*good, bad], tmp_path / "out", tokenizer)
    preprocess([write_shard(tmp_path / "all.jsonl", ITEMS)], tmp_path / "whole", tokenizer)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_nulls_empty_texts_and_other_types_are_as_in_json_lines(tmp_path):
    rows = [{"text": "a", "meta": None}, {"text": "", "meta": {"n": 1}},
            {"text": None, "meta": {"n": None}}, {"text": "b", "meta": {"n": 2}}]
    path, lines = write(tmp_path / "a.parquet", rows), tmp_path / "a.jsonl"
    lines.write_bytes(as_jsonl(rows))
    for file, place in ((path, "row"), (lines, "line")):
        report = ReadReport()
        assert documents(file, on_error="skip", report=report) == [("a", None), ("b", {"n": 2})]
        assert (report.seen, report.empty, report.skipped) == (4, 1, 1)
        assert (report.skipped_lines[0].line, "not a string but" in
                report.skipped_lines[0].reason) == (3, True)
        with pytest.raises(ValueError, match=f"{file}, {place} 3: .*not a string but"):
            documents(file)


def test_what_json_does_not_have_is_its_text(tmp_path):
    import datetime

    path = tmp_path / "a.parquet"
    day = datetime.date(2020, 1, 2)
    pq.write_table(pa.table({"text": ["a"], "meta": [{"day": day, "n": float("nan")}]}), path)
    (document,) = iterate_documents([path])
    assert document.meta["day"] == "2020-01-02"


def test_maps_are_objects(tmp_path):
    path = tmp_path / "a.parquet"
    maps = pa.array([[("pile_set_name", "Github")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"text": ["a"], "meta": maps}), path)
    assert documents(path) == [("a", {"pile_set_name": "Github"})]


@pytest.mark.parametrize("text", [pa.binary(), pa.string()], ids=str)
def test_a_text_that_is_not_utf_8_is_named_or_skipped(tmp_path, text):
    raw = pa.array([b"good", b"bad \xff", b"fine"], pa.binary())
    column = raw if text == pa.binary() else pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(ValueError, match="a.parquet, row 2: not UTF-8: 0xff at byte 4"):
        documents(path)
    assert [text for text, _ in documents(path, on_error="skip")] == ["good", "fine"]


def test_a_missing_column_is_named_once_with_those_there(tmp_path):
    path = write(tmp_path / "a.parquet", [{"content": "a", "n": 1}] * 3)
    with pytest.raises(ValueError, match=r"no column 'text'; columns here: 'content', 'n' \(--"):
        documents(path)
    assert documents(path, text_key="content") == [("a", None)] * 3
    report = ReadReport()
    assert not list(read_shard(path, "text", "skip", report)) and report.skipped == 1


def test_two_columns_of_a_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    with pytest.raises(ValueError, match="more than one column 'text'"):
        documents(path)


def test_damage_is_named_wherever_it_is(tmp_path):
    whole = write(tmp_path / "whole.parquet", ITEMS, compression="zstd").read_bytes()
    for name, content in (("cut", whole[:-100]), ("empty", b""), ("head", whole[:4]),
                          ("hole", whole[:900] + bytes(200) + whole[1100:])):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.parquet, row \d+: damaged or cut off: \S.*"
                                             "nothing from this row on is read"):
            documents(path)
        report = ReadReport()
        list(read_shard(path, "text", "skip", report))
        assert report.skipped == 1 and report.seen == report.documents + 1
        assert len(report.sha256) == 64


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="the file holds no record"):
        documents(path)


def test_a_document_over_the_limit_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "a"}, {"text": "b" * 2000}, {"text": "c"}])
    report = ReadReport()
    assert [d.text for d in read_shard(path, "text", "skip", report, 1000)] == ["a", "c"]
    assert report.skipped_lines[0].line == 2 and "over the limit" in report.skipped_lines[0].reason


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_a_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 100_000 + str(n) for n in range(600)],
                      "unread": ["y" * 10 for _ in range(600)]})
    pq.write_table(table, path, row_group_size=600, use_dictionary=False, compression="zstd",
                   write_batch_size=8)  # as pages of a megabyte
    del table
    before = pa.total_allocated_bytes()
    pa.default_memory_pool().release_unused()
    tracemalloc.start()
    most = 0
    for _ in iterate_documents([path]):
        most = max(most, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most + python < 40 << 20  # of the 60 MB of the group


def test_without_its_library_it_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ITEMS[:1])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "pyarrow" else find(name, *rest))
    with pytest.raises(ValueError, match="needs the package pyarrow.*pip install pyarrow"):
        expand_inputs([path])
    assert expand_inputs([write_shard(tmp_path / "a.jsonl", ITEMS[:1])])


def test_the_tool_takes_it(tmp_path, tiny_bpe, capsys):
    import preprocess_data

    write(tmp_path / "a.parquet", ITEMS)
    assert not preprocess_data.main(["--input", str(tmp_path / "*.parquet"), "--output",
                                     str(tmp_path / "out"), "--tokenizer", str(tiny_bpe)])
    assert "300 documents" in capsys.readouterr().out
    (source,) = json.loads((tmp_path / "out.json").read_text())["sources"]
    assert os.path.basename(source["path"]) == "a.parquet" and source["records"] == 300
