"""A grid's combinations and their directories, and its commands: how many run at a time, with which
environment and output, and which exit codes end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_spdf.runs import grid
from megatron_spdf.runs.grid import (
    NAME_BYTES,
    Trial,
    axis_of,
    combinations,
    command,
    directory_name,
    ends_grid,
    refuse_control_characters,
    require_launch,
    run_all,
)

AXES = {"lr": axis_of("optimizer.lr", [0.5, 0.25]),
        "size": {"s": {"model.hidden": 8, "model.heads": 1}, "l": {"model.hidden": 16}},
        "seed": axis_of("seed", [1, 2, 3])}


def test_combinations_are_all_and_the_last_axis_varies_fastest():
    found = list(combinations(AXES, "out"))
    assert [tuple(t.labels.values()) for t in found] == [
        (lr, size, seed) for lr in ("0.5", "0.25") for size in "sl" for seed in "123"]
    assert found[0] == Trial({"lr": "0.5", "size": "s", "seed": "1"}, {
        "optimizer.lr": 0.5, "model.hidden": 8, "model.heads": 1, "seed": 1},
        Path("out/lr=0.5,size=s,seed=1"))
    assert found[3].words == ["optimizer.lr=0.5", "model.hidden=16", "seed=1",
                              "output=out/lr=0.5,size=l,seed=1"]
    assert len({t.output for t in found}) == 12


@pytest.mark.parametrize(("most", "refused"), [(12, False), (11, True)])
def test_as_many_combinations_as_anyone_runs(monkeypatch, most, refused):
    monkeypatch.setattr(grid, "MOST_RUNS", most)
    if refused:
        with pytest.raises(ValueError, match="12 combinations are over 11"):
            list(combinations(AXES, "out"))
    else:
        assert len(list(combinations(AXES, "out"))) == 12


def test_two_combinations_of_one_directory_are_refused():
    axes = {"x": {"a/b": {"seed": 1}, "a_b": {"seed": 2}}}
    with pytest.raises(ValueError, match=r"would both write to out/x=a_b; give one"):
        list(combinations(axes, "out"))


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_directorys_name_and_its_log_fit_a_file_system(tmp_path, letter):
    longest = letter * ((NAME_BYTES - 2) // len(letter.encode()))
    longest += "b" * (NAME_BYTES - 2 - len(longest.encode()))
    name = directory_name({"x": longest})
    assert len(name.encode()) == 251
    (tmp_path / f"{name}.txt").touch()
    with pytest.raises(ValueError, match="a directory name of 252 bytes, and 251 are possible"):
        directory_name({"x": longest + "b"})


@pytest.mark.parametrize("value", ["a\nb", ["a", "b\t"], {"k": "\x1b"}, {"a\n": 1},
                                   [{"k": ["\r"]}]])
def test_characters_that_cannot_be_printed_are_refused(value):
    with pytest.raises(ValueError, match="has a character that cannot be printed"):
        refuse_control_characters(value)
    refuse_control_characters([1, None, "é b", {"k": ["c", 0.5]}])


def test_a_command_is_of_this_python_or_of_the_launcher():
    trial = Trial({}, {"seed": 2}, Path("out/a b"))
    script = str(Path(grid.__file__).resolve().parents[2] / "finetune.py")
    words = [script, "r.yaml", "log.every=1", "seed=2", "output=out/a b"]
    assert command("", "finetune.py", "r.yaml", ["log.every=1"], trial) == [grid.sys.executable,
                                                                           *words]
    assert command("srun -n '2 3'", "finetune.py", "r.yaml", ["log.every=1"], trial) == [
        "srun", "-n", "2 3", *words]


@pytest.mark.parametrize(("launch", "said"), [
    ("torchrunn --nproc-per-node 8", "begins with no program that is here; name one in PATH"),
    ("~/bin/torchrun", "begins with no program that is here"), (" ", "begins with no program"),
    ("/tmp", "begins with no program"), ("sh -c 'x", "is no command .No closing quot")])
def test_a_launcher_that_is_not_here_is_refused(launch, said):
    with pytest.raises(ValueError, match=f"^--launch {re.escape(repr(launch))} {said}"):
        require_launch(launch)
    for there in ("", "sh", "/bin/sh -c 'a b'", f"{sys.executable} -W ignore"):
        require_launch(there)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Runs commands, whose words are exit codes, without processes. Returns the codes, and
    output and environment of each; as many of them as `meet` wait for each other."""
    def run(words: list[int], jobs: int | None, meet: int = 1, patience: float = 20.0):
        started, barrier = [], threading.Barrier(meet)

        def start(words, over, stdout, stderr, env):
            started.append((stdout, env))
            assert stdout is stderr
            if len(started) <= meet:
                barrier.wait(patience)
            if stdout:
                os.write(stdout.fileno(), b"written")
            return int(words[0])

        monkeypatch.setattr(grid, "_exit_code", start)
        commands = {tmp_path / "grid" / f"run={i}": [str(code)] for i, code in enumerate(words)}
        return run_all(commands, jobs), started
    return run


@pytest.mark.parametrize(("jobs", "threads"), [(None, None), (1, None), (2, "1"), (3, "1")])
def test_so_many_run_at_a_time_each_with_a_thread(runs, monkeypatch, tmp_path, jobs, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    codes, started = runs([0, 0, 0], jobs, meet=jobs or 1)
    assert codes == [0, 0, 0] and len(started) == 3
    assert {env.get("OMP_NUM_THREADS") for _, env in started} == {threads}
    assert all(env["PATH"] == os.environ["PATH"] for _, env in started)
    logs = [f"run={i}.txt" for i in range(3)] if jobs else []
    assert sorted(p.name for p in (tmp_path / "grid").iterdir()) == logs
    assert all(p.read_text() == "written" for p in (tmp_path / "grid").iterdir())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert {env["OMP_NUM_THREADS"] for _, env in runs([0], jobs)[1]} == {"7"}


@pytest.mark.parametrize(("jobs", "meet"), [(None, 2), (1, 2), (2, 3)])
def test_no_more_run_at_a_time_than_are_asked_for(runs, jobs, meet):
    with pytest.raises(threading.BrokenBarrierError):
        runs([0] * meet, jobs, meet, patience=0.1)


@pytest.mark.parametrize(("words", "run"), [([0, 3, 1, 0], 4), ([0, 2, 0], 2), ([75, 0], 1),
                                            ([3, 75, 0, 0], 2)])
def test_bad_input_and_signals_end_a_grid_and_other_failures_do_not(runs, capsys, words, run):
    codes, started = runs(words, None)
    assert codes == words[:run] and len(started) == run
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"$ {code}" for code in words[:run]]
    failed = [code for code in words[:run] if code]
    assert [line.split("code ")[1] for line in said.err.splitlines()] == list(map(str, failed))
    assert ends_grid(codes) == next((c for c in codes if c in (2, 75)), 0)


def test_both_outputs_of_a_run_beside_others_are_in_its_file(tmp_path, capsys):
    words = {tmp_path / f"r{i}": ["sh", "-c", f"echo out {i}; echo error {i} >&2; exit 3"]
             for i in range(2)}
    assert run_all(words, 2) == [3, 3]
    said = capsys.readouterr().err
    for i, output in enumerate(words):
        log = output.with_suffix(".txt")
        assert log.read_text() == f"out {i}\nerror {i}\n"
        assert f"{output} ended with exit code 3, see {log}\n" in said


PROGRAM = """
import sys
from pathlib import Path
from megatron_spdf.runs.grid import run_all
run = ["sh", "-c", "trap 'echo saved; exit 75' TERM; echo began; while :; do sleep 0.1; done"]
print(run_all({Path(sys.argv[1], name): run for name in "abcd"}, 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_program_alone_reaches_its_runs(tmp_path, number):
    """As `kill` sends it; a terminal and Slurm send it to all."""
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "grid")], text=True,
                               stdout=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    logs = [tmp_path / "grid" / f"{name}.txt" for name in "ab"]
    try:
        while not all(log.is_file() and log.read_text() for log in logs):
            assert program.poll() is None
        program.send_signal(number)
        said = program.communicate(timeout=60)[0].splitlines()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert [log.read_text() for log in logs] == ["began\nsaved\n"] * 2
    assert len(list((tmp_path / "grid").iterdir())) == 2  # nothing else began
    if number == signal.SIGINT:
        assert program.returncode != 0
    else:
        assert (said[-1], program.returncode) == ("[75, 75]", 0)
