"""The demo's work: so many parts at a time, none twice, and what fails or is interrupted leaves
nothing running."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from demo_parts.progress import Part, Progress
from demo_parts.work import Failed, Work, command, steps_done

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def progress(tmp_path):
    made = Progress(10.0, tmp_path / "done", 6)
    yield made
    made.close()


def part(place: Path, name: str, call, ranks: int = 1, works: int = 1) -> Part:
    return Part(name, 5.0, [Work(f"do {name}", call, place / "logs" / f"{name}.log", ranks)
                            for _ in range(works)], lambda: f"said {name}")


def span(place: Path, name: str, seconds: float = 0.3, beside: str = ""):
    """Work that takes a while, and as long as another has not begun, and leaves when it began and
    ended."""
    def call() -> int:
        begin = time.monotonic()
        (place / f"{name}.begun").touch()
        while beside and not (place / f"{beside}.begun").exists():
            assert time.monotonic() < begin + 60
            time.sleep(0.01)
        time.sleep(seconds)
        (place / f"{name}.span").write_text(f"{begin} {time.monotonic()}")
        return 0
    return call


def spans(place: Path, *names: str) -> list[list[float]]:
    return [[float(word) for word in (place / f"{name}.span").read_text().split()]
            for name in names]


@pytest.mark.parametrize("at_once", [1, 2])
def test_so_many_parts_at_a_time_in_their_order(progress, tmp_path, capsys, at_once):
    names, asked = ["one", "two", "three"], []
    beside = {"one": "two", "two": "one"} if at_once == 2 else {}
    progress.perform([part(tmp_path, name, span(tmp_path, name, beside=beside.get(name, "")))
                      for name in names], at_once, meanwhile=lambda: asked.append(os.getpid()))
    found = spans(tmp_path, *names)
    most = max(sum(begin <= other < end for begin, end in found) for other, _ in found)
    assert most == at_once and asked == [os.getpid()]
    out, err = capsys.readouterr()
    assert sorted(line.split()[0] for line in out.splitlines()) == sorted(names)
    assert all(f"said {name}" in out for name in names)
    assert err == "" and all(c.isprintable() or c == "\n" for c in out)  # no terminal, no bar


def test_what_was_done_is_not_done_again(progress, tmp_path, capsys):
    progress.perform([part(tmp_path, "one", span(tmp_path, "one", 0.0))])
    (before,) = spans(tmp_path, "one")
    progress.perform([part(tmp_path, "one", span(tmp_path, "one", 0.0))])
    assert spans(tmp_path, "one") == [before] and "before  said one" in capsys.readouterr().out


def test_a_failure_is_told_and_stops_the_others(progress, tmp_path):
    def fail() -> int:
        print("a word on why")
        sys.stdout.flush()
        return 3

    with pytest.raises(Failed) as failed:
        progress.perform([part(tmp_path, "slow", span(tmp_path, "slow", 60.0)),
                          part(tmp_path, "bad", fail)], at_once=2)
    assert failed.value.code == 3 and failed.value.work.line == "do bad"
    assert failed.value.work.log.read_text() == "$ do bad\na word on why\n"
    assert not (tmp_path / "slow.span").exists()
    assert not (tmp_path / "done" / "bad").exists()
    assert not (tmp_path / "done" / "slow").exists()


def test_an_interrupt_stops_all_ranks(progress, tmp_path):
    def wait() -> int:
        (tmp_path / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(60.0)
        return 0

    def interrupt() -> None:
        while len(list(tmp_path.glob("rank*"))) < 2:
            time.sleep(0.02)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        progress.perform([part(tmp_path, "two", wait, ranks=2)], meanwhile=interrupt)
    for file in tmp_path.glob("rank*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_command_is_a_script_with_its_words(tmp_path):
    (tmp_path / "say.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ.get('RANK'))\n"
                                     "sys.exit(int(sys.argv[1]))\n")
    script, log = os.path.relpath(tmp_path / "say.py", ROOT), tmp_path / "log"
    for ranks, launcher in ((1, "python"), (2, "torchrun --nproc-per-node 2")):
        work = command([script, 0, "a b"], log, ranks)
        work.start()
        while not work.ended():
            time.sleep(0.02)
        assert f"$ {launcher} {script} 0 'a b'\n" in log.read_text()
    said = [line for line in log.read_text().splitlines() if line[0] == "["]
    assert sorted(said) == ["['0', 'a b'] 0", "['0', 'a b'] 1", "['0', 'a b'] None"]
    failing = command([script, 4], log)
    failing.start()
    with pytest.raises(Failed, match="exit code 4"):
        while not failing.ended():
            time.sleep(0.02)


def test_the_share_of_a_run_is_read_from_its_log(tmp_path):
    assert steps_done(tmp_path, 10) == 0.0
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "train", "step": 4}\n{"kind": "valid", "step": 5}\n')
    assert steps_done(tmp_path, 10) == 0.5
    log.write_text('{"kind": "train", "step": 4}\n{"kind": "va')  # while it is written
    assert steps_done(tmp_path, 10) == 0.0
