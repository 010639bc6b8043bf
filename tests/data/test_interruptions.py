"""Whatever ends a run, and however many workers it has: the result is that of an undisturbed run,
byte for byte."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from text_shards import ROOT, content, records, write_shard

from megatron_spdf.data.indexed.manifest import InputFile, PreprocessSettings
from megatron_spdf.data.preprocess import incremental
from megatron_spdf.data.preprocess.encode import RecordBatch
from megatron_spdf.data.preprocess.incremental import AppendFile, FinishedInput, Journal, Work
from megatron_spdf.data.preprocess.preprocess import preprocess
from megatron_spdf.data.preprocess.staging import Partial
from megatron_spdf.data.preprocess.workers import Workers
from megatron_spdf.data.tokenizers.tokenizer import load_tokenizer

KINDS = {
    "one data set": [],
    "split, sets, no duplicates": ["--split", "90,5,5", "--by-set", "--deduplicate"],
    "per shard": ["--per-shard"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Six shards of about 1 MB of text, of all formats."""
    directory = tmp_path_factory.mktemp("shards")
    suffixes = ("jsonl", "jsonl.gz", "jsonl.zst") * 2
    return [write_shard(directory / f"{i}.{suffix}", records(800, seed=i)) for i,
            suffix in enumerate(suffixes)]


class Killed(BaseException):
    """Ends a run as abruptly as a test in the same process can."""


def start(shards: list[Path], output: Path, tokenizer: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "tools/preprocess_data.py", "--input", *shards, "--output", output,
               "--tokenizer", tokenizer, *words]
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONWARNINGS": "ignore"},
                            preexec_fn=hear_interrupts)


def hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(run: subprocess.Popen, code: int = 0) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == code, out + err
    assert "Traceback" not in err
    return out + err


def wait_for_inputs(partial: Partial, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while partial.finished_inputs < count:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)


def is_complete(partial: Partial) -> bool:
    """Whether all is in its place and nothing is left to do."""
    made = Path(partial.prefix) if partial.several else Path(f"{partial.prefix}.json")
    return made.exists() and not partial.directory.exists()


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, shards, tmp_path_factory, tiny_bpe) -> tuple[str, dict[str, str], float]:
    """(kind, content, seconds) of a run with two workers that nothing interrupts."""
    output, started = tmp_path_factory.mktemp("undisturbed") / "t", time.monotonic()
    finish(start(shards, output, tiny_bpe, "--workers", "2", *KINDS[request.param]))
    return request.param, content(output), time.monotonic() - started


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(shards, undisturbed, tmp_path, tiny_bpe):
    kind, expected, _ = undisturbed
    for workers in ("1", "3"):
        finish(start(shards, tmp_path / workers / "t", tiny_bpe, "--workers",
                     workers, *KINDS[kind]))
        assert content(tmp_path / workers / "t") == expected and expected


@pytest.mark.slow
def test_killed_at_random_moments_equals_undisturbed(shards, undisturbed, tmp_path, tiny_bpe):
    """Kills fall anywhere: before the start, in an input, between two, while names are given. Every
    third comes soon after another input is finished, so that a busy machine, on which time says
    little, gets on too."""
    kind, expected, duration = undisturbed
    words = ["--workers", "2", *KINDS[kind]]
    draw, killed, kept, kills = random.Random(kind), 0, set(), 10 if kind == "one data set" else 6
    output, partial = tmp_path / "killed" / "t", Partial(tmp_path / "killed" / "t",
                                                         bool(KINDS[kind]))
    while killed < kills:
        run, before = start(shards, output, tiny_bpe, *words), partial.finished_inputs
        if killed % 3 == 2:
            while run.poll() is None and partial.finished_inputs in (0, before):
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.2))
        else:
            with suppress(subprocess.TimeoutExpired):
                run.wait(draw.uniform(0.0, 1.1 * duration))
        killed += run.poll() is None
        workers = psutil.Process(run.pid).children() if run.poll() is None else []
        run.kill()
        run.communicate()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "workers outlive the run that started them"
        kept.add(partial.finished_inputs)
        if is_complete(partial):  # maybe of a run that was killed as it left
            assert content(output) == expected
            words = words if "--overwrite" in words else [*words, "--overwrite"]
    if not is_complete(partial):
        finish(start(shards, output, tiny_bpe, *words))
    assert content(output) == expected
    assert len(kept) > 1, f"the kills all fell at the same point: {kept}"


@pytest.mark.slow
def test_a_resumed_run_does_not_read_finished_inputs_again(shards, tmp_path, tiny_bpe):
    output, partial = tmp_path / "t", Partial(tmp_path / "t", False)
    run = start(shards, output, tiny_bpe, "--workers", "2")
    wait_for_inputs(partial, 2, run)
    run.kill()
    run.communicate()
    entries = [json.loads(line)
               for line in (partial.directory / "ledger.jsonl").read_text().splitlines()]
    before = sum(entry["source"]["tokens"] for entry in entries)
    said = finish(start(shards, output, tiny_bpe, "--progress"))
    total = json.loads(Path(f"{output}.json").read_bytes())["tokens"]
    assert len(entries) >= 2 and re.findall(r"([\d,]+) tokens\]", said)[-1] == f"{total - before:,}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_keeps_what_is_finished_and_says_so(shards, tmp_path, tiny_bpe, number):
    for attempt in range(3):  # on a busy machine a run may be done before the signal reaches it
        output = tmp_path / f"{attempt}"
        partial = Partial(output, False)
        run = start(shards, output, tiny_bpe, "--workers", "2")
        wait_for_inputs(partial, 1, run)
        workers = psutil.Process(run.pid).children()
        run.send_signal(number)
        out, said = run.communicate(timeout=300)
        if not partial.ready and not is_complete(partial):
            break
    assert run.returncode == 128 + number and "Traceback" not in said, out + said
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert partial.finished_inputs >= 1 and not Path(f"{output}.bin").exists()
    if number == signal.SIGINT:
        assert (
            f"{partial.directory} keeps {partial.finished_inputs} finished inputs; the same command"
            in said
        )


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_a_remedy(shards, tmp_path, tiny_bpe):
    output, partial = tmp_path / "t", Partial(tmp_path / "t", False)
    run = start(shards, output, tiny_bpe, "--workers", "2")
    wait_for_inputs(partial, 1, run)
    victims = []
    for process in psutil.Process(run.pid).children():
        with suppress(psutil.Error):  # it may have ended just now
            victims += [process] * ("spawn_main" in " ".join(process.cmdline()))
    victims[0].kill()
    said = finish(run, code=2)
    assert "a worker process died near" in said and "take fewer --workers" in said
    assert "the same command goes on from there" in said


def make_large(batch: RecordBatch) -> bytes:
    """In place of an encoder: a result of many pieces, at most of whose moments it is handed
    back."""
    return bytes(8 << 20)


@pytest.mark.parametrize("milliseconds", [0, 3, 6, 10, 15, 20])
def test_a_worker_that_dies_in_the_middle_of_a_result_ends_the_run(milliseconds):
    """The others would keep the pipe of results open, if it were that of all."""
    batches = (RecordBatch(Path("a.jsonl"), [(line, b"")], size=1 << 20, bytes_read=0)
               for line in itertools.count(1))
    workers, said = Workers(make_large, 2), []

    def run() -> None:
        results = workers.map(batches)
        next(results)
        threading.Timer(milliseconds / 1000, workers.processes.started[0].kill).start()
        with pytest.raises(RuntimeError, match="a worker process died near a.jsonl, line") as info:
            deque(results, maxlen=0)
        workers.close()
        said.append(str(info.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert said


def interrupted(directory: Path, tiny_bpe: Path, **settings) -> list[Path]:
    """PREFIX.partial of a run that finished two inputs and stopped at the third, which is bad."""
    paths = [write_shard(directory / f"{i}.jsonl", records(3000, seed=i)) for i in range(3)]
    with open(paths[2], "ab") as file:
        file.write(b"bad\n")
    with pytest.raises(ValueError, match="2.jsonl, line 3001: not valid JSON"):
        preprocess(paths, directory / "t", load_tokenizer(tiny_bpe), **settings)
    assert Partial(directory / "t", bool(settings)).finished_inputs == 2
    return paths


@pytest.fixture
def stopped(tmp_path, tiny_bpe) -> list[Path]:
    return interrupted(tmp_path, tiny_bpe)


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["skip", "correct"])
@pytest.mark.parametrize("settings", [{}, {"split": (1, 1), "deduplicate": True}])
def test_after_a_bad_record_the_run_goes_on(tmp_path, tiny_bpe, remedy, settings, monkeypatch):
    paths = interrupted(tmp_path, tiny_bpe, **settings)
    if remedy == "correct":
        write_shard(paths[2], records(2000, seed=7))
    read = []
    opened = preprocess.__globals__["read_batches"]
    monkeypatch.setattr("megatron_spdf.data.preprocess.preprocess.read_batches",
                        lambda p, s: read.extend(p) or opened(p, s))
    on_error = "skip" if remedy == "skip" else "stop"
    preprocess(paths, tmp_path / "t", load_tokenizer(tiny_bpe), on_error=on_error, **settings)
    assert read == paths[2:]
    preprocess(paths, tmp_path / "anew", load_tokenizer(tiny_bpe), on_error=on_error, **settings)
    made, anew = content(tmp_path / "t"), content(tmp_path / "anew")
    assert list(made.values()) == list(anew.values()) or sorted(made.values()) == sorted(
        anew.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("change", "said"), [
    ({"append_eod": False}, "append_eod was True and is False"),
    ({"ftfy": True}, "ftfy was False and is True"),
    ({"text_key": "body"}, "text_key was text and is body"),
])
def test_other_settings_are_not_mixed_into_an_interrupted_run(tmp_path, stopped, tiny_bpe, change,
                                                              said):
    with pytest.raises(ValueError,
                       match="t.partial holds an interrupted run with other settings: "
                             f"{said}.*remove"):
        preprocess(stopped, tmp_path / "t", load_tokenizer(tiny_bpe), **change)
    assert Partial(tmp_path / "t", False).finished_inputs == 2


def test_another_tokenizer_is_not_mixed_into_an_interrupted_run(tmp_path, stopped, tiny_bpe):
    from megatron_spdf.data.tokenizers.tokenizer import train_tokenizer

    other = train_tokenizer("bpe", [r["text"] for r in records(9)], 280, tmp_path / "other")
    before = load_tokenizer(tiny_bpe).sha256
    with pytest.raises(ValueError, match=f"tokenizer_sha256 was {before} and is {other.sha256}"):
        preprocess(stopped, tmp_path / "t", other)


def test_inputs_that_changed_under_an_interrupted_run_are_named(tmp_path, stopped, tiny_bpe):
    tokenizer = load_tokenizer(tiny_bpe)
    with pytest.raises(ValueError,
                       match="input 1, .*0.jsonl, is .*1.jsonl now. Give the same inputs"):
        preprocess(stopped[1:], tmp_path / "t", tokenizer)
    with pytest.raises(ValueError, match="input 2, .*1.jsonl, is not given now"):
        preprocess(stopped[:1], tmp_path / "t", tokenizer)
    write_shard(stopped[1], records(2999, seed=1))
    with pytest.raises(ValueError, match="input 2, .*1.jsonl, has changed since"):
        preprocess(stopped, tmp_path / "t", tokenizer)
    os.utime(stopped[0])  # of the same size
    with pytest.raises(ValueError, match="input 1, .*0.jsonl, has changed since"):
        preprocess(stopped, tmp_path / "t", tokenizer)


@pytest.mark.slow
def test_tokens_that_a_crash_of_the_machine_lost_are_missed(tmp_path, stopped, tiny_bpe):
    os.truncate(tmp_path / "t.partial" / "part.bin", 1000)
    with pytest.raises(ValueError,
                       match="part.bin holds 1000 bytes and its ledger says .* the disk lost"):
        preprocess(stopped, tmp_path / "t", load_tokenizer(tiny_bpe), on_error="skip")


@pytest.mark.parametrize(("settings", "least", "expected"), [
    ({}, 1, [1, 1, 1]), ({"split": (9, 1), "deduplicate": True}, 1, [1, 1, 1]),
    ({}, 1 << 20, [3]),  # small ones together
    ({"per_shard": True}, 1 << 20, [1, 1, 1])], ids=str)  # whose files are closed
def test_all_of_an_input_is_on_disk_before_the_ledger_says_so(tmp_path, tiny_bpe, monkeypatch,
                                                              settings, least, expected):
    """Files that were written to since their last sync are none when the ledger is."""
    synced, sync, append = {}, AppendFile.sync, AppendFile.append

    def note(file: AppendFile) -> None:
        synced[file.path.name] = file.path.stat().st_size
        sync(file)

    def grow(file: AppendFile, content: bytes) -> None:
        if file.path.name == "ledger.jsonl":
            files = [f for f in file.path.parent.rglob("*") if f.suffix in (".bin", ".lengths")
                     or f.name == "digests"]
            assert len(files) >= 2 and {f.name: f.stat().st_size for f in files} == {
                f.name: synced.get(f.name) for f in files}
            ledgers.append(content.count(b"\n"))
        append(file, content)

    ledgers: list[int] = []
    monkeypatch.setattr(AppendFile, "sync", note)
    monkeypatch.setattr(AppendFile, "append", grow)
    monkeypatch.setattr(incremental, "_SYNC_BYTES", least)
    shards = [write_shard(tmp_path / f"{n}.jsonl", records(30, seed=n)) for n in range(3)]
    preprocess(shards, tmp_path / "t", load_tokenizer(tiny_bpe), **settings)
    assert ledgers == expected and "ledger.jsonl" in synced


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"split": (9, 1)}])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_an_interrupted_renaming_is_finished(tmp_path, tiny_bpe, monkeypatch, settings, overwrite,
                                             moves):
    tokenizer = load_tokenizer(tiny_bpe)
    old = write_shard(tmp_path / "old.jsonl", records(9))
    new = write_shard(tmp_path / "new.jsonl", records(90, seed=1))
    preprocess([new], tmp_path / "expected" / "t", tokenizer, **settings)
    expected = content(tmp_path / "expected" / "t")
    if overwrite:
        preprocess([old], tmp_path / "t", tokenizer, **settings)

    left, publish = iter(range(moves)), Partial.publish

    def counted(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return function(*arguments, **options)
        return call

    def cut_off(partial: Partial) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            patch.setattr(Path, "rename", counted(Path.rename))
            publish(partial)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(Partial, "publish", cut_off)
        preprocess([new], tmp_path / "t", tokenizer, overwrite=overwrite, **settings)
    if (tmp_path / "t.partial").exists():
        preprocess([new], tmp_path / "t", tokenizer, **settings)
    assert content(tmp_path / "t") == expected


def test_a_ledger_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path):
    work = Work(settings=PreprocessSettings(), tokenizer_sha256="0", dtype="uint16", versions={})
    entries = [FinishedInput(source=InputFile(path=f"{n}.jsonl", size=n, documents=n), mtime_ns=n,
                             parts={}, part_of={}, skipped_lines=[]) for n in range(3)]
    ledger = tmp_path / "ledger.jsonl"

    def add(*more: FinishedInput) -> list[FinishedInput]:
        journal = Journal(tmp_path, work)
        there = list(journal.finished)
        for entry in more:
            journal.add(entry, [], now=True)
        journal.close()
        return there

    add(*entries)
    whole = ledger.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for end in range(last, len(whole)):
        ledger.write_bytes(whole[:end])
        assert add(entries[2]) == entries[:2]
        assert ledger.read_bytes() == whole


def test_that_all_is_made_is_forgotten_last(tmp_path, monkeypatch):
    """A run that is killed while it cleans up leaves nothing but that to the next."""
    partial = Partial(tmp_path / "data", several=False)
    left, remove = [], shutil.rmtree

    def rmtree(path) -> None:
        if path == partial.directory:
            left.extend(entry.name for entry in path.iterdir())
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with partial.opened(overwrite=False):
        for name in ("ready", "part.bin", "ledger.jsonl"):
            (partial.directory / name).write_text("x")
        (partial.directory / "part.tokenizer").mkdir()
    assert left == ["ready"] and not partial.directory.exists()
