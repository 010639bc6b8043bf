"""Document readers: everything in the files comes out, and what cannot is named or accounted
for."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd

from megatron_spdf.data.preprocess.documents import (
    ReadReport,
    Skipped,
    expand_inputs,
    iterate_documents,
    read_shard,
    sample_texts,
)

SHARED = Path(os.environ.get("SPDF_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
PILE = SHARED / "pile_sample" / "val.jsonl.zst"
TEXTS = [f"document {i} " + "Grüße 東京 🙂\n\t\x00 " * (i % 7) for i in range(200)]
COMPRESS = {".jsonl": bytes, ".jsonl.zst": zstd.compress, ".jsonl.gz": gzip.compress}


def as_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": t, "meta": {"n": i}}).encode() + b"\n" for i,
                    t in enumerate(texts))


def read(path: Path, **options) -> list[str]:
    return [document.text for document in iterate_documents([path], **options)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_document_with_its_meta_and_place(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", COMPRESS[suffix](as_lines(TEXTS)))
    report = ReadReport()
    documents = list(iterate_documents([path], report=report))
    assert [d.text for d in documents] == TEXTS
    assert [d.meta for d in documents] == [{"n": i} for i in range(200)]
    assert [(d.path, d.line) for d in documents] == [(path, i + 1) for i in range(200)]
    assert report == ReadReport(seen=200, documents=200, bytes_read=path.stat().st_size)


@pytest.mark.parametrize("named", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt"])
@pytest.mark.parametrize("kind", [".gz", ".zst", ".parquet"])
def test_a_name_that_says_another_format_is_refused_whatever_becomes_of_bad_records(
        tmp_path, named, kind):
    content = {".parquet": lambda text: b"PAR1" + text}.get(kind) or COMPRESS[f".jsonl{kind}"]
    path = write(tmp_path / f"a{named}", content(as_lines(TEXTS)))
    if named.endswith(kind):
        assert read(path) == TEXTS
    else:
        with pytest.raises(ValueError, match=f"names end in {kind} do; give it such a name"):
            list(iterate_documents([path], on_error="skip"))


@pytest.mark.parametrize("kind, pack", [(".xz", lzma.compress), (".bz2", bz2.compress)])
def test_a_packed_format_that_nothing_here_reads_is_named(tmp_path, kind, pack):
    path = write(tmp_path / "a.txt", pack(as_lines(TEXTS)))
    with pytest.raises(ValueError, match=rf"names end in \{kind} do; unpack it"):
        list(iterate_documents([path], on_error="skip"))
    assert read(write(tmp_path / "b.txt", b"BZh is how a packed file begins")) == [
        "BZh is how a packed file begins"]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_several_frames_cut_anywhere(tmp_path, suffix):
    content = as_lines(TEXTS)
    pieces = [content[i : i + 777] for i in range(0, len(content), 777)] + [b""]
    path = write(tmp_path / f"a{suffix}", b"".join(map(COMPRESS[suffix], pieces)))
    assert read(path) == TEXTS


def test_zstd_frames_that_hold_metadata_are_passed_over(tmp_path):
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"extra"
    frames = (
        zstd.compress(as_lines(TEXTS[:9]))
        + skippable
        + zstd.compress(as_lines(TEXTS[9:]))
    )
    assert read(write(tmp_path / "a.jsonl.zst", skippable + frames + skippable)) == TEXTS


@pytest.mark.skipif(not PILE.exists(), reason="no Pile-format sample in ../shared/data")
def test_pile_shard_equals_a_plain_reading():
    plain = io.TextIOWrapper(zstd.open(PILE), encoding="utf-8", newline="\n")
    assert read(PILE) == [json.loads(line)["text"] for line in plain]


def test_a_shard_is_never_in_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    line = as_lines(["x" * 10_000])
    path.write_bytes(b"".join(zstd.compress(line * 100) for _ in range(40)))
    tracemalloc.start()
    count = sum(1 for _ in iterate_documents([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 10e6, f"{peak / 1e6:.0f} MB for a shard of 40 MB"


def test_a_text_file_is_one_document(tmp_path):
    text = "one\r\n\n\ntwo\n"
    path = write(tmp_path / "a.txt", text.encode())
    [document] = iterate_documents([path])
    assert (document.text, document.meta, document.line) == (text, None, 1)


def test_blank_lines_bom_crlf_and_missing_last_newline(tmp_path):
    content = (b'\xef\xbb\xbf{"text": "a"}\r\n\n  \t\r\n{"text": ""}\n'
               b'{"text": " ", "meta": 3}\n{"text": "b"}')
    report = ReadReport()
    documents = list(iterate_documents([write(tmp_path / "a.jsonl", content)], report=report))
    assert [(d.text, d.meta, d.line) for d in documents] == [("a", None, 1), (" ", None, 5),
                                                             ("b", None, 6)]
    assert (report.seen, report.documents, report.empty, report.skipped) == (4, 3, 1, 0)


BAD_RECORDS = [
    (b'{"text": "cut', "not valid JSON"),
    (b'{"text": 1} {"text": 2}', "not valid JSON: Extra data"),
    (b"[" * 100_000, "not valid JSON"),
    (b'["text"]', "not a JSON object but a list"),
    (b'{"content": "x", "id": 1}', "no key 'text'; keys here: 'content', 'id'"),
    (b'{"text": null}', "'text' is not a string but a NoneType"),
    (b'{"text": ["x"]}', "'text' is not a string but a list"),
    (b'{"text": "a", "text": "b"}', "'text' is not a string but given 2 times: 'a', 'b'"),
    (b'{"text": "\xff"}', "not UTF-8: 0xff at byte 10"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS)
def test_a_bad_record_stops_with_file_line_reason_and_remedy(tmp_path, record, reason):
    path = write(tmp_path / "a.jsonl",
                 as_lines(TEXTS[:3]) + b"\n" + record + b"\n" + as_lines(TEXTS[3:5]))
    drawn = []
    with pytest.raises(ValueError) as error:
        for document in iterate_documents([path]):
            drawn.append(document.text)
    assert drawn == TEXTS[:3]
    for part in (f"{path}, line 5: ", reason, "--on-error skip"):
        assert part in str(error.value)


def test_bad_records_are_skipped_and_accounted_for(tmp_path):
    bad = b"".join(record + b"\n" for record, _ in BAD_RECORDS)
    path = write(tmp_path / "a.jsonl", as_lines(TEXTS[:3]) + bad + as_lines(["", "last"]))
    report = ReadReport()
    assert read(path, on_error="skip", report=report) == [*TEXTS[:3], "last"]
    assert (report.seen, report.documents, report.empty, report.skipped) == (14, 4, 1, 9)
    for line, (skipped, (_, reason)) in enumerate(zip(report.skipped_lines, BAD_RECORDS,
                                                      strict=True), 4):
        assert (skipped.path, skipped.line) == (str(path), line)
        assert reason in skipped.reason


def test_the_list_of_skipped_lines_is_capped_the_count_is_not(tmp_path):
    path = write(tmp_path / "a.jsonl", b"bad\n" * 1500 + as_lines(["x"]))
    report = ReadReport()
    assert read(path, on_error="skip", report=report) == ["x"]
    assert (report.skipped, len(report.skipped_lines)) == (1500, 1000)
    assert report.skipped_lines[-1] == Skipped(str(path), 1000, report.skipped_lines[0].reason)


def test_text_key(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"content": "x", "text": 1}\n')
    assert read(path, text_key="content") == ["x"]


def test_a_text_file_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(ValueError, match=r"a.txt, line 1: not UTF-8: 0xe9 in line 3"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.999])
def test_a_file_cut_off_is_an_error_and_never_a_shorter_file(tmp_path, suffix, share):
    whole = b"".join(COMPRESS[suffix](as_lines(TEXTS[i : i + 50])) for i in range(0, 200, 50))
    size = int(len(whole) * share)
    path = write(tmp_path / f"a{suffix}", whole[:size])
    with pytest.raises(ValueError,
                       match=rf"line \d+: damaged or cut off near byte {size} of {size}"):
        read(path)
    report = ReadReport()
    texts = [document.text for document in read_shard(path, "text", "skip", report)]
    assert texts == TEXTS[: len(texts)] and (share < 0.9 or len(texts) >= 150)
    assert (report.skipped, report.seen) == (1, len(texts) + 1)
    [skipped] = report.skipped_lines
    assert skipped.line == len(texts) + 1
    assert "nothing after this line is read" in skipped.reason


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz"])
def test_damage_inside_a_file_is_named_with_its_byte(tmp_path, suffix):
    noise = [f"{i} " + bytes((i * j * 7919) % 251 for j in range(3000)).hex() for i in range(200)]
    content = bytearray(COMPRESS[suffix](as_lines(noise[:100]))
                        + COMPRESS[suffix](as_lines(noise[100:])))
    middle = len(COMPRESS[suffix](as_lines(noise[:100]))) + 2
    content[middle] ^= 0xFF
    path = write(tmp_path / f"a{suffix}", bytes(content))
    with pytest.raises(ValueError,
                       match=rf"line 101: damaged or cut off near byte \d+ of {len(content)}"):
        read(path)
    report = ReadReport()
    assert read(path, on_error="skip", report=report) == noise[:100]
    assert (report.seen, report.skipped) == (101, 1)


def test_a_gzip_checksum_is_checked(tmp_path):
    content = bytearray(gzip.compress(as_lines(TEXTS)))
    content[-6] ^= 0xFF
    with pytest.raises(ValueError, match="CRC"):
        read(write(tmp_path / "a.jsonl.gz", bytes(content)))


def test_garbage_after_the_last_frame(tmp_path):
    for suffix in (".jsonl.zst", ".jsonl.gz"):
        path = write(tmp_path / f"a{suffix}",
                     COMPRESS[suffix](as_lines(TEXTS)) + b"garbage garbage")
        with pytest.raises(ValueError, match="line 201: damaged"):
            read(path)


def test_failures_of_the_machine_are_never_skipped(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(TEXTS)))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gzip.GzipFile, "readline", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(path, on_error="skip")


def test_inputs_are_files_and_sorted_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[x].jsonl"):
        write(tmp_path / name, b'{"text": "x"}\n')
    names = [path.name for path in expand_inputs([tmp_path / "c.txt", str(tmp_path / "?.jsonl")])]
    assert names == ["c.txt", "a.jsonl", "b.jsonl"]
    assert expand_inputs([str(tmp_path / "[x].jsonl")]) == [tmp_path / "[x].jsonl"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nosuch*.jsonl"], "'.*nosuch.*' matches no file"),
        ([], "no input given"),
        (["."], "is a directory; give its files"),
        (["a.csv"], r"a.csv has no known format; .*jsonl.zst"),
        (["a.jsonl", "*.jsonl"], "a.jsonl is named twice"),
    ],
)
def test_bad_inputs(tmp_path, monkeypatch, inputs, message):
    write(tmp_path / "a.jsonl", as_lines(["x"]))
    write(tmp_path / "a.csv", b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(iterate_documents(inputs))


def test_no_document_at_all(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\n{"text": ""}\nbad\n')
    with pytest.raises(ValueError, match="no document in the inputs: 1 empty records, 1 skipped"):
        read(path, on_error="skip")


def test_on_error_has_two_values(tmp_path):
    with pytest.raises(ValueError, match="on_error is 'ignore'; choose one of .*stop.*skip"):
        read(write(tmp_path / "a.jsonl", as_lines(["x"])), on_error="ignore")


def test_sample_is_spread_over_the_files(tmp_path):
    sizes = {"a": 100, "b": 3, "c": 100}
    paths = [
        write(tmp_path / f"{name}.jsonl", as_lines([f"{name}{i:09}" for i in range(n)]))
        for name, n in sizes.items()
    ]
    texts = list(sample_texts(paths, 600, "text", "stop"))
    assert {name: sum(t[0] == name for t in texts) for name in sizes} == {"a": 20, "b": 3, "c": 37}


def test_a_frame_of_the_largest_window(tmp_path):
    """As `zstd --long=31` writes it."""
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.hash_log: 10,
               zstd.CompressionParameter.chain_log: 10}
    compressor = zstd.ZstdCompressor(options=options)
    # piece by piece, so that the frame names its window and not the size of its content
    frame = compressor.compress(as_lines(TEXTS)) + compressor.flush()
    assert read(write(tmp_path / "a.jsonl.zst", frame)) == TEXTS


def test_a_cut_in_any_frame_is_found(tmp_path):
    first, second = (zstd.compress(as_lines(part)) for part in (TEXTS[:9], TEXTS[9:]))
    for cut in (1, 5, len(first) - 1, len(first) + 1, len(first) + 5, len(first + second) - 1):
        path = write(tmp_path / "a.jsonl.zst", (first + second)[:cut])
        with pytest.raises(ValueError, match=f"damaged or cut off near byte {cut} of {cut}"):
            read(path)


@pytest.mark.parametrize("name", ["a.ndjson", "a.ndjson.gz", "a.ndjson.zst", "a.json", "a.json.gz",
                                  "a.json.zst"])
def test_other_names_of_json_lines(tmp_path, name):
    pack = COMPRESS.get(".jsonl" + Path(name).suffix, bytes)
    assert read(write(tmp_path / name, pack(as_lines(TEXTS)))) == TEXTS
    with pytest.raises(ValueError, match=f"{name}, line 1: not valid JSON.*a record is one line"):
        read(write(tmp_path / name, pack(b'[\n {"text": "a"}\n]\n')))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bom_wherever_files_were_joined(tmp_path, suffix):
    bom = b"\xef\xbb\xbf"
    content = bom + as_lines(TEXTS[:3]) + bom + as_lines(TEXTS[3:5]) + bom + b"\n"
    assert read(write(tmp_path / f"a{suffix}", COMPRESS[suffix](content))) == TEXTS[:5]
    text = "one\n\ufefftwo"
    assert read(write(tmp_path / "a.txt", bom + text.encode())) == [text]


def test_rubbish_after_a_gzip_member_is_called_so(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(TEXTS)) + b"rubbish")
    with pytest.raises(ValueError, match="line 201: .*behind the last gzip member: Not a gzipped"):
        read(path)
    assert read(path, on_error="skip") == TEXTS
    zeros = write(tmp_path / "b.jsonl.gz", gzip.compress(as_lines(TEXTS)) + bytes(512))
    assert read(zeros) == TEXTS  # padding, as tapes have it


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_under_two_names_is_refused(tmp_path, link):
    write(tmp_path / "a.jsonl", as_lines(["x"]))
    link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="a.jsonl is named a second time as .*b.jsonl"):
        expand_inputs([str(tmp_path / "*.jsonl")])
