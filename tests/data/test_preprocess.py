"""Preprocessing: the data set is the documents, token for token, or it is not there."""

from __future__ import annotations

import argparse
import errno
import gzip
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from backports import zstd

from megatron_spdf.data.preprocess import preprocess as preprocess_module
from megatron_spdf.data.preprocess.encode import split_bounds
from megatron_spdf.data.preprocess.preprocess import check_prefix, preprocess, read_manifest
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SPDF_DATA", ROOT / ".." / "shared" / "data"))
PILE = SHARED / "pile_sample" / "val.jsonl.zst"
GPT2 = SHARED / "gpt2_tokenizer"
TEXTS = [f"Document {i}: " + "the best of times, 東京 🙂 <|endoftext|>\n" * (i % 9)
         for i in range(120)]
SUFFIXES = {"bin", "idx", "json", "tokenizer"}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    train_tokenizer("bpe", TEXTS, 300, directory)
    return directory


@pytest.fixture(scope="module")
def tool():
    """tools/preprocess_data.py as a module, to call its main() without starting Python anew."""
    sys.path.insert(0, str(ROOT / "tools"))
    module = importlib.import_module("preprocess_data")
    sys.path.remove(str(ROOT / "tools"))
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def as_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write_shards(directory: Path) -> list[Path]:
    """TEXTS over four files of all formats, in order."""
    contents = {
        "a.jsonl": as_lines(TEXTS[:50]),
        "b.jsonl.zst": b"".join(zstd.compress(as_lines(TEXTS[i : i + 10]))
                                for i in range(50, 90, 10)),
        "c.jsonl.gz": gzip.compress(as_lines(TEXTS[90:119])),
        "d.txt": TEXTS[119].encode(),
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [directory / name for name in contents]


def read_back(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data_set = IndexedDataset(str(prefix))
    assert data_set.document_indices.tolist() == list(range(len(data_set) + 1))
    return [data_set[i].tolist() for i in range(len(data_set))]


def suffixes(prefix: Path) -> set[str]:
    """What lies under the name of a data set, PREFIX.partial included."""
    return {path.name.removeprefix(f"{prefix.name}.")
            for path in prefix.parent.glob(f"{prefix.name}.*")}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, bpe) -> Path:
    """A directory with in.jsonl and the data set "train" made from it."""
    directory = tmp_path_factory.mktemp("pristine")
    (directory / "in.jsonl").write_bytes(as_lines(TEXTS))
    preprocess([directory / "in.jsonl"], directory / "train", load_tokenizer(bpe))
    return directory


@pytest.fixture
def data_set(pristine, tmp_path) -> Path:
    """A data set to damage."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "train"


@pytest.mark.parametrize("append_eod", [True, False])
def test_the_data_set_is_the_documents(tmp_path, bpe, append_eod):
    tokenizer, prefix = load_tokenizer(bpe), tmp_path / "out" / "v1.0.train"
    preprocess(write_shards(tmp_path), prefix, tokenizer, append_eod=append_eod)
    end = [tokenizer.eod] if append_eod else []
    assert read_back(prefix) == [tokenizer.encode(text) + end for text in TEXTS]
    assert suffixes(prefix) == SUFFIXES


@pytest.mark.slow
@pytest.mark.skipif(not (PILE.exists() and GPT2.exists()),
                    reason="no Pile-format sample in ../shared/data")
def test_a_pile_shard_equals_a_plain_loop_over_tokenizers(tmp_path):
    import tokenizers

    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe"))
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    manifest = preprocess([PILE], tmp_path / "val", load_tokenizer(GPT2))
    plain = io.TextIOWrapper(zstd.open(PILE), encoding="utf-8", newline="\n")
    texts = [json.loads(line)["text"] for line in plain]
    assert read_back(tmp_path / "val") == [reference.encode(text).ids + [50256] for text in texts]
    assert (manifest.documents, manifest.text_bytes) == (len(texts),
                                                         sum(len(t.encode()) for t in texts))


def test_the_manifest_tells_what_is_there(tmp_path, bpe):
    tokenizer, prefix = load_tokenizer(bpe), tmp_path / "train"
    paths = write_shards(tmp_path)
    manifest = preprocess(paths, prefix, tokenizer)
    expected = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    assert manifest.documents == 120
    assert manifest.tokens == sum(expected)
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.tokenizer.model_dump() == {
        "kind": "gpt2-bpe",
        "vocab_size": 300,
        "eod": 299,
        "sha256": tokenizer.sha256,
    }
    assert (manifest.dtype, manifest.bin_bytes) == ("uint16", 2 * sum(expected))
    assert manifest.idx_bytes == (tmp_path / "train.idx").stat().st_size
    assert [(s.path, s.size, s.documents) for s in manifest.sources] == [
        (str(path), path.stat().st_size, count) for path,
        count in zip(paths, (50, 40, 29, 1), strict=True)
    ]
    assert manifest.versions["megatron-core"] and manifest.versions["tiktoken"]
    assert read_manifest(prefix) == manifest
    assert load_tokenizer(tmp_path / "train.tokenizer").sha256 == tokenizer.sha256


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(65499, "uint16"), (65536, "uint16"), (65537, "int32"), (100_000, "int32")]
)
def test_the_largest_id_survives_at_every_vocabulary_size(tmp_path, vocab_size, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    class Stub:
        """Gives the ids that a type too small would wrap around."""

        kind, eod, sha256 = "stub", vocab_size - 1, "0" * 64

        def __init__(self):
            self.vocab_size = vocab_size

        def encode_array(self, text):
            return np.array([0, vocab_size - 2])

        def save(self, directory):
            directory.mkdir()

    (tmp_path / "a.txt").write_text("x")
    assert preprocess([tmp_path / "a.txt"], tmp_path / "t", Stub()).dtype == dtype
    assert read_back(tmp_path / "t") == [[0, vocab_size - 2, vocab_size - 1]]
    # How Megatron reads when it is told the counts and derives the type from the vocabulary size.
    code = 4 if vocab_size > 65536 else 8
    told = IndexedDataset(str(tmp_path / "t"), sequences_per_dataset=(1, 2), dtype_code=code)
    assert told[0].tolist() == [0, vocab_size - 2, vocab_size - 1]


def test_records_in_are_records_out_plus_skipped_plus_empty(tmp_path, bpe):
    content = as_lines(["one", "", "two"]) + b"not json\n\n" + as_lines(["three"]) + b'{"id": 1}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(["four"]))[:-4])
    (tmp_path / "c.jsonl").write_bytes(as_lines(["five"]))
    tokenizer, prefix = load_tokenizer(bpe), tmp_path / "t"
    with pytest.raises(ValueError, match="a.jsonl, line 4: not valid JSON"):
        preprocess([str(tmp_path / "*.jsonl*")], prefix, tokenizer)
    assert suffixes(prefix) == set()

    manifest = preprocess([str(tmp_path / "*.jsonl*")], prefix, tokenizer, on_error="skip")
    texts = [tokenizer.decode(ids[:-1]) for ids in read_back(prefix)]
    assert texts in (["one", "two", "three", "five"], ["one", "two", "three", "four", "five"])
    assert (manifest.documents, manifest.empty, manifest.skipped) == (len(texts), 1, 3)
    skipped = [(Path(s.path).name, s.line) for s in manifest.skipped_lines]
    assert skipped == [("a.jsonl", 4), ("a.jsonl", 7), ("b.jsonl.gz", len(texts) - 3)]
    assert [(s.documents, s.empty, s.skipped)
            for s in manifest.sources][::2] == [(3, 1, 2), (1, 0, 0)]


def test_a_document_without_tokens_is_empty(tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, model_type="bpe",
        minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    (tmp_path / "a.jsonl").write_bytes(as_lines(["best", "   ", "times"]))
    manifest = preprocess([tmp_path / "a.jsonl"], tmp_path / "t",
                          load_tokenizer(tmp_path / "m.model"))
    assert (manifest.documents, manifest.empty) == (2, 1)
    assert len(read_back(tmp_path / "t")) == 2


def test_input_without_documents_is_refused_and_leaves_nothing(tmp_path, bpe):
    (tmp_path / "a.jsonl").write_bytes(as_lines(["", ""]))
    with pytest.raises(ValueError, match="no document in the inputs: 2 empty"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "t", load_tokenizer(bpe))
    assert suffixes(tmp_path / "t") == set()


def test_no_tokenizer_is_made_where_the_data_set_cannot_be(tmp_path, monkeypatch):
    """Nor trained for a place of its own that cannot be written."""
    monkeypatch.setattr(Path, "mkdir", refuse_to_make)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(OSError, match="Read-only file system"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "b", lambda: pytest.fail("it was made"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="tokenizer=.*file/tok cannot be written"):
        train_tokenizer("bpe", (pytest.fail("read") for _ in "a"), 300, tmp_path / "file/tok")


def refuse_to_make(path: Path, **settings) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_an_existing_data_set_is_kept_unless_overwritten(data_set, bpe):
    before = {suffix: Path(f"{data_set}.{suffix}").stat() for suffix in SUFFIXES}
    other = data_set.parent / "other.jsonl"
    other.write_bytes(as_lines(["other"]))
    with pytest.raises(ValueError, match=r"output exists: .*train.bin.*--overwrite"):
        preprocess([other], data_set, load_tokenizer(bpe))
    (data_set.parent / "bad.jsonl").write_bytes(as_lines(["fine"]) + b"bad\n")
    with pytest.raises(ValueError, match="line 2"):
        preprocess([data_set.parent / "bad.jsonl"], data_set, load_tokenizer(bpe), overwrite=True)
    assert {suffix: Path(f"{data_set}.{suffix}").stat() for suffix in SUFFIXES} == before

    preprocess([other], data_set, load_tokenizer(bpe), overwrite=True)
    assert len(read_back(data_set)) == check_prefix(data_set).documents == 1
    assert suffixes(data_set) == SUFFIXES


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_any_file_of_the_name_is_in_the_way(data_set, bpe, suffix):
    for other in SUFFIXES - {suffix, "tokenizer"}:
        Path(f"{data_set}.{other}").unlink()
    if suffix != "tokenizer":
        shutil.rmtree(f"{data_set}.tokenizer")
    with pytest.raises(ValueError, match=f"train.{suffix}"):
        preprocess([data_set.parent / "in.jsonl"], data_set, load_tokenizer(bpe))


@pytest.mark.parametrize(("size", "found"), [
    ("100MB", 10**8), ("1GiB", 2**30), ("1", 1), ("0", None), ("-5", None), ("nan", None),
    ("1e400", None), ("", None)])
def test_sizes_are_over_zero(tool, size, found):
    if found:
        assert tool.parse_bytes(size) == found
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size; write for example"):
            tool.parse_bytes(size)


@pytest.mark.parametrize("output", ["{}/", "{}/.", "{}/sub/..", ".", ".."])
def test_output_must_be_a_prefix(tmp_path, bpe, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="a directory; add the start of the file names: .*train"):
        preprocess([tmp_path / "a.txt"], output.format(tmp_path), load_tokenizer(bpe))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("output", ["a.txt/x", "a.txt/x/y"])
def test_output_under_a_file_is_named(tmp_path, bpe, output, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="cannot be written: .*/a.txt is a file; choose another"):
        preprocess([tmp_path / "a.txt"], output, load_tokenizer(bpe))


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_is_bad_input(tmp_path, bpe, tool, capsys, monkeypatch, length):
    """At 250 bytes the name of the data set in the making is too long."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    words = ["--input", "a.txt", "--output", "n" * length, "--tokenizer", str(bpe)]
    try:
        code = tool.main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("shares", [(98, math.nan), (math.nan, 1), (math.inf, 1), (1e308, 1e308),
                                    (0, 1), (1, -1), (1,), (1, 1, 1, 1)], ids=str)
def test_shares_are_two_or_three_numbers(shares):
    with pytest.raises(ValueError, match="is not train,valid"):
        split_bounds(shares)


def start_long_run(tmp_path: Path, bpe: Path) -> subprocess.Popen:
    """The tool in a process of its own, returned when it is in the middle of writing."""
    long_text = as_lines(["to be or not to be " * 5000] * 1000)
    (tmp_path / "in.jsonl.zst").write_bytes(zstd.compress(long_text))
    arguments = ["--input", tmp_path / "in.jsonl.zst", "--output", tmp_path / "t", "--tokenizer",
                 bpe]
    run = subprocess.Popen(
        [sys.executable, "tools/preprocess_data.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / "t.partial" / "part.bin"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)
    return run


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_under_the_final_names(tmp_path, bpe):
    run = start_long_run(tmp_path, bpe)
    with pytest.raises(ValueError,
                       match="t.partial is in use: another run is making this data set"):
        preprocess([tmp_path / "in.jsonl.zst"], tmp_path / "t", load_tokenizer(bpe))
    run.kill()
    run.communicate()
    assert suffixes(tmp_path / "t") == {"partial"}
    with pytest.raises(ValueError, match="no file .*t.bin"):
        check_prefix(tmp_path / "t")
    (tmp_path / "in.jsonl.zst").write_bytes(zstd.compress(as_lines(TEXTS)))
    preprocess([tmp_path / "in.jsonl.zst"], tmp_path / "t", load_tokenizer(bpe))
    assert len(read_back(tmp_path / "t")) == len(TEXTS)


@pytest.mark.slow
def test_a_terminated_run_cleans_up(tmp_path, bpe):
    run = start_long_run(tmp_path, bpe)
    run.terminate()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert suffixes(tmp_path / "t") == set()


def test_an_interrupted_run_cleans_up(data_set, bpe, tool, capsys, monkeypatch):
    def interrupt(*_):
        assert Path(f"{data_set}.partial").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_spdf.data.tokenizers.gpt2.Gpt2Bpe.encode_array", interrupt)
    before = {suffix: Path(f"{data_set}.{suffix}").stat() for suffix in SUFFIXES}
    arguments = ["--input", f"{data_set.parent}/in.jsonl", "--output", str(data_set), "--overwrite"]
    assert tool.main([*arguments, "--tokenizer", str(bpe)]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted; no data set was written\n"
    assert {suffix: Path(f"{data_set}.{suffix}").stat() for suffix in SUFFIXES} == before
    assert suffixes(data_set) == SUFFIXES


def test_check_accepts_a_whole_data_set(data_set, bpe):
    assert check_prefix(data_set) == read_manifest(data_set)
    assert check_prefix(str(data_set), load_tokenizer(bpe).sha256).documents == 120


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_check_names_a_missing_file(data_set, suffix):
    Path(f"{data_set}.{suffix}").unlink()
    with pytest.raises(ValueError, match=rf"train\.{suffix}.*preprocess_data\.py"):
        check_prefix(data_set)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("suffix", "state"),
                         [("bin", "cut off"), ("idx", "cut off"), ("bin", "too long")])
def test_check_names_both_sizes_of_a_file_that_changed(data_set, foreign, suffix, state):
    path = Path(f"{data_set}.{suffix}")
    content = path.read_bytes()
    changed = content[:100] if state == "cut off" else content + b"xx"
    path.write_bytes(changed)
    if foreign:
        make_foreign(data_set)
    message = rf"train\.{suffix} is {state}: {len(changed)} bytes, .* says {len(content)}"
    with pytest.raises(ValueError, match=message):
        check_prefix(data_set)


def test_check_refuses_the_index_of_another_data_set(data_set, bpe):
    (data_set.parent / "one.txt").write_text("one")
    preprocess([data_set.parent / "one.txt"], data_set.parent / "one", load_tokenizer(bpe))
    shutil.copy(data_set.parent / "one.idx", f"{data_set}.idx")
    with pytest.raises(ValueError,
                       match=r"train\.idx is cut off: 62 bytes, and .*train\.json says"):
        check_prefix(data_set)


@pytest.mark.parametrize("size", [0, 10, 33])
def test_check_names_an_index_shorter_than_its_header(data_set, size):
    path = Path(f"{data_set}.idx")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"train\.idx is cut off: {size} bytes"):
        check_prefix(data_set)


@pytest.mark.parametrize("byte", [0, 9, 17])
def test_check_refuses_a_file_that_is_no_index(data_set, byte):
    path = Path(f"{data_set}.idx")
    content = bytearray(path.read_bytes())
    content[byte] = 99
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.idx is not an index of Megatron"):
        check_prefix(data_set)


def test_check_refuses_another_tokenizer_and_shows_both(data_set, bpe):
    ours, other = load_tokenizer(bpe).sha256, "f" * 64
    with pytest.raises(ValueError,
                       match=f"made with the tokenizer {ours}, and the run uses {other}"):
        check_prefix(data_set, other)


def test_check_refuses_an_empty_corpus(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(str(tmp_path / "t.bin")).finalize(str(tmp_path / "t.idx"))
    with pytest.raises(ValueError, match="holds no document"):
        check_prefix(tmp_path / "t")


@pytest.mark.parametrize("change", [b"not json", b"{}", b'{"format_version": 2}'])
def test_check_refuses_a_damaged_manifest(data_set, change):
    Path(f"{data_set}.json").write_bytes(change)
    with pytest.raises(ValueError, match=r"train\.json, line 1: .* not a manifest of format"):
        check_prefix(data_set)


def make_foreign(prefix: Path) -> None:
    """Leave what Megatron-LM's own tool writes."""
    Path(f"{prefix}.json").unlink()
    shutil.rmtree(f"{prefix}.tokenizer")


def test_check_accepts_a_data_set_of_another_tool(data_set):
    ours = check_prefix(data_set)
    make_foreign(data_set)
    foreign = check_prefix(data_set, "f" * 64)
    assert foreign.tokenizer is None
    for field in ("documents", "tokens", "dtype", "bin_bytes", "idx_bytes"):
        assert getattr(foreign, field) == getattr(ours, field)


@pytest.mark.slow
def test_the_check_needs_neither_torch_nor_megatron(data_set):
    program = (
        "import sys; from megatron_spdf.data.preprocess.preprocess import check_prefix; "
        f"check_prefix({str(data_set)!r}); assert not {{'torch', 'megatron'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_tool_writes_and_sums_up_in_one_line(tmp_path, bpe, tool, capsys):
    write_shards(tmp_path)
    arguments = ["--input", f"{tmp_path}/*.jsonl*", f"{tmp_path}/d.txt", "--output",
                 f"{tmp_path}/t"]
    assert tool.main([*arguments, "--tokenizer", str(bpe)]) == 0
    out, err = capsys.readouterr()
    manifest = check_prefix(tmp_path / "t", load_tokenizer(bpe).sha256)
    assert out.startswith(f"{tmp_path}/t: 120 documents, {manifest.tokens:,} tokens, 0.0 MB of "
                          "text in ")
    assert out.endswith("MB/s), 0 skipped, 0 empty\n") and out.count("\n") == 1
    assert err == ""


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_tool_trains_a_tokenizer_on_its_input(tmp_path, tool, kind, capsys):
    write_shards(tmp_path)
    arguments = ["--input", f"{tmp_path}/*.jsonl*", "--output", f"{tmp_path}/t", "--no-eod",
                 "--progress"]
    arguments += ["--tokenizer", f"{tmp_path}/tok", "--train-tokenizer", kind, "--train-bytes",
                  "20kB"]
    assert tool.main([*arguments, "--vocab-size", "330"]) == 0
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 330
    assert read_back(tmp_path / "t") == [tokenizer.encode(text) for text in TEXTS[:119]]
    bar = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"input: 100%.* text [\d.]+ MB/s, [\d,]+ documents/s, [\d,]+ tokens", bar), bar
    assert tool.main([*arguments, "--vocab-size", "330", "--overwrite"]) == 2
    assert "tok exists; use it without --train-tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tokenizer", "nosuch"], "error: no tokenizer at nosuch"),
        (["--input", "nosuch.jsonl"], "error: input 'nosuch.jsonl' matches no file"),
        (["--text-key", "body"], "error: .*in.jsonl, line 1: no key 'body'; keys here: 'text'"),
        (["--output", "/proc/nosuch/t"], "error: .*/proc/nosuch"),
        (["--vocab-size", "300"], "--train-tokenizer and --vocab-size go together"),
        (["--train-bytes", "much"], "'much' is not a size; write for example 100MB"),
        (["--on-error", "ignore"], "invalid choice: 'ignore'"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(tmp_path, bpe, tool, capsys, change, message):
    (tmp_path / "in.jsonl").write_bytes(as_lines(["x"]))
    usual = {"--input": f"{tmp_path}/in.jsonl", "--output": f"{tmp_path}/t",
             "--tokenizer": str(bpe)}
    try:
        code = tool.main([word for pair in (usual | {change[0]: change[1]}).items()
                          for word in pair])
    except SystemExit as end:
        code = end.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last
    assert suffixes(tmp_path / "t") == set()


@pytest.mark.slow
def test_the_tool_runs_from_a_checkout_without_traceback(tmp_path):
    arguments = ["--input", "nosuch.jsonl", "--output", str(tmp_path / "t"), "--tokenizer",
                 "nosuch"]
    run = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", *arguments], cwd=ROOT, capture_output=True,
        text=True
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: input 'nosuch.jsonl'") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(("done", "count"), [(0, 3), (1, 3), (2, 1)])
def test_workers_are_started_while_inputs_are_left(monkeypatch, done, count):
    started, paths = [], [Path("a.jsonl"), Path("b.jsonl")]

    class Started:
        def __init__(self, encoder, count):
            started.append(count)

        def map(self, items):
            return iter(())

        def close(self):
            started.append("closed")

    monkeypatch.setattr(preprocess_module, "Workers", Started)
    monkeypatch.setattr(preprocess_module, "CorpusWriter", lambda *_: Started(None, None))
    monkeypatch.setattr(preprocess_module, "Bar", lambda *_: nullcontext())
    preprocess_module._tokenize(None, None, paths, done, SimpleNamespace(settings=None), 3, None)
    assert started == [None, count, "closed", "closed"]
