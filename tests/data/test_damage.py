"""Damaged input: named with its place, or skipped, counted and listed; never a silently shorter
data set."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from text_shards import ROOT, as_jsonl, content, documents_of, records, write_shard

from megatron_spdf.data.preprocess import corpus_writer, finalize
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.preprocess.records import ReadReport, read_records
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

COUNT = 300
LINES = as_jsonl(records(COUNT)).splitlines(keepends=True)


def with_line(line: bytes):
    """A third of the lines, the bad one, the rest; for any compression."""
    return lambda path: write_raw(path, b"".join([*LINES[:100], line, *LINES[100:]]))


def write_raw(path: Path, raw: bytes) -> None:

    from backports import zstd

    compress = {".zst": zstd.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    pieces = raw.splitlines(keepends=True)
    path.write_bytes(b"".join(compress(b"".join(pieces[i : i + 50]))
                              for i in range(0, len(pieces), 50)))


def cut(share: float):
    def damage(path: Path) -> None:
        write_shard(path, records(COUNT))
        os.truncate(path, int(path.stat().st_size * share))
    return damage


def flip(path: Path) -> None:
    """A byte in the middle of a frame after the first."""
    write_shard(path, records(COUNT))
    changed = bytearray(path.read_bytes())
    for place in range(len(changed) // 2, len(changed) // 2 + 40):
        changed[place] ^= 0xFF
    path.write_bytes(changed)


# kind -> (file name, how it is made, what is said, line, documents that are there in spite of it)
DAMAGE = {
    "bad JSON": ("x.jsonl.zst", with_line(b'{"text": "cut\n'), "not valid JSON", 101, COUNT),
    "no text": ("x.jsonl.gz", with_line(b'{"body": "?", "id": 3}\n'),
                "no key 'text'; keys here: 'body'", 101, COUNT),
    "text of another type": ("x.jsonl", with_line(b'{"text": null}\n'),
                             "not a string but a NoneType", 101, COUNT),
    "invalid UTF-8": ("x.jsonl.zst", with_line(b'{"text": "\xc3\x28"}\n'),
                      "not UTF-8: 0xc3 at byte 10", 101, COUNT),
    "invalid UTF-8 in a text file": ("x.txt", lambda path: path.write_bytes(b"a\n\xff"),
                                     "0xff in line 2", 1, 0),
    "zst cut off": ("x.jsonl.zst", cut(0.5), "damaged or cut off near byte", None, None),
    "zst with another byte": ("x.jsonl.zst", flip, "damaged or cut off near byte", None, None),
    "gz cut off": ("x.jsonl.gz", cut(0.9), "damaged or cut off near byte", None, None),
    "not zst at all": ("x.jsonl.zst", lambda path: path.write_bytes(b"".join(LINES)),
                       "damaged or cut off", 1, 0),
    "a line too long": ("x.jsonl.zst", with_line(b'{"text": "' + b"y" * 9000 + b'"}\n'),
                        "a record of 9,012 bytes, over the limit of 8,000", 101, COUNT),
    "a last line too long": ("x.jsonl", lambda path: path.write_bytes(LINES[0] + b"z" * 8001),
                             "of 8,001 bytes", 2, 1),
    "a text file too long": ("x.txt", lambda path: path.write_bytes(b"z\n" * 5000),
                             "of 10,000 bytes", 1, 0),
    "an empty file": ("x.jsonl", lambda path: path.touch(), "the file holds no record", 1, 0),
    "an empty text file": ("x.txt", lambda path: path.touch(), "the file holds no record", 1, 0),
    "an empty zst": ("x.jsonl.zst", lambda path: path.touch(), "the file is empty", 1, 0),
    "an empty gz": ("x.jsonl.gz", lambda path: path.touch(), "the file is empty", 1, 0),
    "a zst of nothing": ("x.jsonl.zst", lambda path: write_raw(path, b"\n"),
                         "the file holds no record", 1, 0),
}


@pytest.mark.parametrize(("kind", "workers"), [
    *((kind, 1) for kind in DAMAGE),
    *(pytest.param(kind, 2, marks=pytest.mark.slow)
      for kind in ("bad JSON", "zst cut off", "a line too long"))])
def test_damage_stops_the_run_or_is_skipped_and_told(tmp_path, tiny_bpe, kind, workers):
    name, damage, said, line, survivors = DAMAGE[kind]
    tokenizer, bad = load_tokenizer(tiny_bpe), tmp_path / name
    before = write_shard(tmp_path / "before.jsonl", records(20, seed=1))
    after = write_shard(tmp_path / "later.jsonl.zst", records(30, seed=2))
    damage(bad)
    options = {"max_document_bytes": 8000, "workers": workers}
    with pytest.raises(ValueError) as error:
        preprocess([before, bad, after], tmp_path / "t", tokenizer, **options)
    assert f"{bad}, line {line or ''}" in str(error.value) and said in str(error.value)
    assert "--on-error skip" in str(error.value)
    assert not list(tmp_path.glob("t*"))

    manifest = preprocess([before, bad, after], tmp_path / "t", tokenizer, on_error="skip",
                          **options)
    there = manifest.sources[1].documents
    assert survivors is None and 0 < there < COUNT or there == survivors
    assert [s.documents for s in manifest.sources] == [20, there, 30]
    assert all(s.records == s.documents + s.skipped for s in manifest.sources)
    [skipped] = manifest.skipped_lines
    assert (skipped.path, skipped.line) == (str(bad), line or there + 1) and said in skipped.reason
    expected = records(20, seed=1) + records(COUNT)[:there] + records(30, seed=2)
    assert [tokenizer.decode(ids[:-1])
            for ids in documents_of(tmp_path / "t")] == [item["text"] for item in expected]


def test_a_gz_with_another_byte(tmp_path, tiny_bpe):
    """Its checksum comes last, so that lines may be garbage before it shows; each of them
    counts."""
    flip(tmp_path / "x.jsonl.gz")
    with pytest.raises(ValueError,
                       match=r"x.jsonl.gz, line \d+: (not |damaged or cut off near byte)"):
        preprocess([tmp_path / "x.jsonl.gz"], tmp_path / "t", load_tokenizer(tiny_bpe))
    manifest = preprocess([tmp_path / "x.jsonl.gz"], tmp_path / "t", load_tokenizer(tiny_bpe),
                          on_error="skip")
    [source] = manifest.sources
    assert source.records == source.documents + source.skipped and 100 <= source.documents < COUNT
    assert any("damaged or cut off near byte" in skipped.reason
               for skipped in manifest.skipped_lines)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_first_bad_place_is_the_one_that_is_named(tmp_path, tiny_bpe, workers):
    """Also if another worker, or the reader, which is ahead, finds a later one sooner."""
    path = write_shard(tmp_path / "a.jsonl", records(3000))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[700] = lines[2900] = b"bad\n"
    path.write_bytes(b"".join(lines))
    cut(0.3)(tmp_path / "b.jsonl.zst")
    with pytest.raises(ValueError, match="a.jsonl, line 701: not valid JSON"):
        preprocess([path, tmp_path / "b.jsonl.zst"], tmp_path / "t", load_tokenizer(tiny_bpe),
                   workers=int(workers))


def test_many_skipped_lines_are_counted_and_the_first_listed(tmp_path, tiny_bpe):
    (tmp_path / "a.jsonl").write_bytes(b"bad\n" * 1500 + LINES[0])
    manifest = preprocess([tmp_path / "a.jsonl"], tmp_path / "t", load_tokenizer(tiny_bpe),
                          on_error="skip")
    assert (manifest.documents, manifest.skipped) == (1, 1500)
    assert [s.line for s in manifest.skipped_lines] == list(range(1, 1001))


def test_the_checksum_of_a_source_is_that_of_the_file_damaged_or_not(tmp_path):
    """Of megabytes behind the damage too, which decompression does not come to."""
    import hashlib

    def early(path: Path) -> None:
        flip(path)
        path.write_bytes(path.read_bytes() + bytes(range(256)) * 2**14)

    for damage in (lambda path: write_shard(path, records(COUNT)), cut(0.5), flip, early):
        damage(tmp_path / "x.jsonl.zst")
        report = ReadReport()
        list(read_records(tmp_path / "x.jsonl.zst", "skip", report))
        assert report.sha256 == hashlib.sha256((tmp_path / "x.jsonl.zst").read_bytes()).hexdigest()


def test_a_count_that_does_not_add_up_writes_nothing(tmp_path, tiny_bpe, monkeypatch):
    from megatron_spdf.data.preprocess import encode

    parse = encode.parse_records

    def lossy(*arguments):
        documents = parse(*arguments)
        next(documents)
        arguments[-1].documents -= 1
        yield from documents

    monkeypatch.setattr(encode, "parse_records", lossy)
    path = write_shard(tmp_path / "a.jsonl", records(10))
    with pytest.raises(RuntimeError, match="10 records in, but 9 documents"):
        preprocess([path], tmp_path / "t", load_tokenizer(tiny_bpe))
    assert not list(tmp_path.glob("t*"))


# Runs a script and says the most memory it took; what the parent is told of it counts the parent's
# own before the exec.
WITH_PEAK = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(open("/proc/self/status").read(), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_single_line_of_200_mb(tmp_path, tiny_bpe):
    """Refused by default, and in memory never; it counts as one record."""
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(LINES[0] + b'{"text": "')
        for _ in range(200):
            file.write(b"to be or not to be, that is the question: " * 25_000)
        file.write(b'"}\n' + LINES[1])
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path),
               "--output", str(tmp_path / "t"), "--tokenizer", str(tiny_bpe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "line 2: a record of 210,000,012 bytes, over the limit of 100,000,000 (--max-document"
        in done.stderr
    )
    done = subprocess.run([sys.executable, "-c", WITH_PEAK, *command[1:], "--on-error", "skip"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "t.json").read_bytes())
    assert (manifest["documents"], manifest["skipped"]) == (2, 1)
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", done.stderr)[-1])
    assert peak < 600e3, f"{peak / 1e3:.0f} MB"  # a few times the limit, and the libraries


def can_mount() -> bool:
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs",
             "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(probe, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(),
                    reason="a full disk needs a file system of its own: no unshare, or not allowed")
def test_a_full_disk(tmp_path, tiny_bpe):
    """The disk fills up in the third shard or so; with more room the same command goes on."""
    paths = [write_shard(tmp_path / f"{i}.jsonl.zst", records(3000, seed=i)) for i in range(4)]
    preprocess(paths, tmp_path / "t", load_tokenizer(tiny_bpe))
    size = (tmp_path / "t.bin").stat().st_size
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", *map(str, paths),
               "--tokenizer", str(tiny_bpe), "--output"]
    small, out = tmp_path / "small", tmp_path / "out"
    small.mkdir()
    script = f"""
        set -u
        mount -t tmpfs -o size={int(size * 0.7)} tmpfs {small}
        {' '.join(command)} {small}/t; echo "code $?"; ls {small}
        mount -o remount,size={4 * size} {small}
        {' '.join(command)} {small}/t; echo "code $?"; ls {small}
        cp -r {small} {out}
    """
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
                          capture_output=True, text=True)
    first, _, second = done.stdout.partition("code 2")
    assert second.split()[0] == "t.partial" and "code 0" in second, done.stdout + done.stderr
    assert (
        "No space left on device" in done.stderr
        and "make room and run the same command again" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert content(out / "t") == content(tmp_path / "t")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bad_record_before_a_damaged_place_is_the_one_that_is_named(tmp_path, tiny_bpe, suffix):
    path = tmp_path / f"x.jsonl.{suffix}"
    with_line(b'{"text": "cut\n')(path)
    os.truncate(path, int(path.stat().st_size * 0.7))
    with pytest.raises(ValueError, match="line 101: not valid JSON"):
        preprocess([path], tmp_path / "t", load_tokenizer(tiny_bpe))


def bomb(window: int, content: bytes, times: int) -> bytes:
    """A zstd frame of `content`, `times` over, that declares a window of 2**window bytes."""
    from backports import zstd

    parameter = zstd.CompressionParameter
    compressor = zstd.ZstdCompressor(options={parameter.window_log: window, parameter.hash_log: 6,
                                              parameter.chain_log: 6, parameter.strategy: 1})
    return b"".join(compressor.compress(content) for _ in range(times)) + compressor.flush()


# what bytes become more than any text is -> (file name, how it is made, what is said)
BOMBS = {
    "a window of 2 GiB and no line end": (
        "x.jsonl.zst", lambda: bomb(31, b"a" * (1 << 20), 700), "a record of more than"),
    "a window of 2 GiB and many lines": (
        "x.jsonl.zst", lambda: bomb(31, b'{"text": ""}' + b" " * 1011 + b"\n", 400_000),
        "a zstd frame with a window of 2,147,483,648 bytes"),
    "such a window behind a sound frame": (
        "x.jsonl.zst", lambda: bomb(20, LINES[0], 1) + bomb(31, b"{}" + b" " * 999 + b"\n",
                                                            400_000),
        "a zstd frame with a window of 2,147,483,648 bytes"),
    "a usual window and no line end": (
        "x.jsonl.zst", lambda: bomb(20, b"a" * (1 << 20), 700), "a record of more than"),
    "gzip and no line end": (
        "x.json.gz", lambda: gzip.compress(b"a" * (200 << 20), 1),
        "a record of more than"),
    "blank lines": ("x.jsonl.zst", lambda: bomb(20, b"\n" * (1 << 20), 2),
                    "more than 1,000,000 blank lines in a row"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory(tmp_path, name):
    """Within 400 MB of more memory than before, whatever the frame declares."""
    file, make, said = BOMBS[name]
    (tmp_path / file).write_bytes(make())
    program = ("import resource, sys\n"
               "from pathlib import Path\n"
               "from megatron_spdf.data.preprocess.records import ReadReport, read_records\n"
               "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
               "for on_error in ('skip', 'stop'):\n"
               "    report = ReadReport()\n"
               "    try:\n"
               "        for _ in read_records(Path(sys.argv[1]), on_error, report, 10_000_000):\n"
               "            pass\n"
               "        print(report.skipped_lines[-1].reason)\n"
               "    except ValueError as error:\n"
               "        print(error)\n"
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / file)], text=True,
                          capture_output=True, cwd=ROOT)
    skipped, stopped, peak = done.stdout.strip().split("\n")
    assert said in skipped and said in stopped and f"{tmp_path / file}, line " in stopped
    assert int(peak) < 400e3, f"{int(peak) / 1e3:.0f} MB"


@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("place", ["first", "later"])
def test_so_many_blank_lines_in_a_row_are_read_over_and_no_more(tmp_path, monkeypatch, most, place):
    monkeypatch.setattr("megatron_spdf.data.preprocess.records._MOST_BLANK", most)
    begin = b"" if place == "first" else b'{"text": "a"}\n' + b" \n" * most + b'{"text": "b"}\n'

    def read(blank: int) -> int:
        path = tmp_path / f"{blank}.jsonl"
        path.write_bytes(begin + b"\n" * blank + b'{"text": "c"}\n')
        return len(list(read_records(path, "stop", ReadReport(), 1000)))

    assert read(most) == (1 if place == "first" else 3)
    with pytest.raises(ValueError, match=f"more than {most} blank lines in a row"):
        read(most + 1)


@pytest.mark.parametrize("bad", [(2, 2), (5, 0), (0, 5), (4, 4)])
def test_the_first_of_what_is_skipped_is_listed_and_all_is_counted(tmp_path, tiny_bpe, monkeypatch,
                                                                   bad):
    """Of all inputs together; here three."""
    for module in (corpus_writer, finalize):
        monkeypatch.setattr(module, "MAX_RECORDED_SKIPS", 3)
    for name, count in zip("ab", bad, strict=True):
        (tmp_path / f"{name}.jsonl").write_bytes(b"{\n" * count + as_jsonl(records(9)))
    found = preprocess([tmp_path / f"{name}.jsonl" for name in "ab"], tmp_path / "text",
                       load_tokenizer(tiny_bpe), on_error="skip")
    places = [(f"{name}.jsonl", line) for name, count in zip("ab", bad, strict=True)
              for line in range(1, count + 1)]
    assert (found.skipped, found.documents) == (sum(bad), 18)
    assert [(Path(line.path).name, line.line) for line in found.skipped_lines] == places[:3]
