"""Invariant 8: pretrain.py, as users start it, writes into its run directory alone. It is run to
the end, stopped, killed, and started again."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from forked_ranks import TORCHRUN, free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"tokens_per_second", "model_tflops_per_rank", "step_seconds", "data_seconds",
          "memory_bytes"}


def records(run: Path) -> list[dict]:
    """The log without what depends on the clock, and without the records that every start adds."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMING} for r in lines
            if r["kind"] not in ("bytes", "save")]


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out


def wait_for(run: Path, step: int, process) -> None:
    while not ((run / "log.jsonl").exists()
               and f'"step": {step},' in (run / "log.jsonl").read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(start, workplace):
    """An undisturbed run on two tensor-parallel ranks."""
    before = {p for p in workplace.rglob("*")}
    out = finish(start("output=straight", "parallel.tensor=2", ranks=2, launcher=TORCHRUN,
                       HOME=str(workplace / "home")))
    return workplace / "straight", out, {p.relative_to(workplace).parts[0]
                                         for p in workplace.rglob("*")
                                         if p not in before}


def test_a_run_reports_what_it_does(straight):
    run, out, _ = straight
    log = records(run)
    train = [r for r in log if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 25))
    assert [r["step"] for r in log if r["kind"] == "valid"] == [6, 12, 18, 24]
    assert train[-1]["loss"] < train[0]["loss"]
    assert {r["sparsity"] for r in train} == {0.75}
    assert train[-1]["tokens"] == 24 * 8 * 32
    assert train[11]["flops"] == pytest.approx(12 * train[0]["flops"])
    assert train[1]["lr"] == pytest.approx(1e-3)  # the end of the warm-up
    assert train[-1]["lr"] == pytest.approx(1e-4)
    for said in ("sparsity plan", "layout: 2 ranks = tensor 2", "SdpaCoreAttention", "AdamW",
                 "MiB per step"):
        assert said in out


def test_nothing_is_written_outside_the_run(straight):
    assert straight[2] == {"straight"}


def test_tensorboard_holds_the_same(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _, _ = straight
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    there = {e.step: e.value for e in events.Scalars("train/loss")}
    assert there == pytest.approx({r["step"]: r["loss"] for r in records(run) if r["kind"]
                                   == "train"})


def test_a_finished_run_is_left_alone(straight, start):
    run, _, _ = straight
    before = records(run)
    out = finish(start("output=straight", "parallel.tensor=2", ranks=2))
    assert "resumed from step_00000024" in out
    assert records(run) == before


def test_pipeline_stages_train_alike(straight, start, workplace):
    finish(start("output=stages", "parallel.pipeline=2", ranks=2))
    there, alone = ([r["loss"] for r in records(run) if r["kind"] == "train"]
                    for run in (workplace / "stages", straight[0]))
    assert there == pytest.approx(alone, rel=1e-5)  # other sums, in fp32


def test_another_recipes_run_is_refused(straight, start):
    process = start("output=straight", "optimizer.lr=2e-3", "sparsity=0.5")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert (
        "optimizer.lr is 0.001 there and 0.002 here" in err
        and "sparsity.level is 0.75 there and 0.5 here" in err
    )


@pytest.fixture(scope="module")
def slowly(workplace) -> dict[str, str]:
    """The environment of a run that is to be met in the middle, also by a test that is late."""
    (workplace / "slow_steps.py").write_text("""
import time
from megatron_spdf.resilience.progress import Progress
set_activity = Progress.set_activity
def slow(self, activity, *rest, **more):
    set_activity(self, activity, *rest, **more)
    time.sleep(0.2 if activity.startswith("step ") else 0.0)
Progress.set_activity = slow
""")
    return {"SPDF_PLUGINS": "slow_steps", "PYTHONPATH": str(workplace)}


def test_stopped_twice_by_a_signal_equals_straight(straight, start, workplace, slowly):
    run = workplace / "stopped"
    for step, number in ((5, signal.SIGTERM), (13, signal.SIGTERM)):
        process = start(f"output={run.name}", "parallel.tensor=2", "data.workers=2", ranks=2,
                        **slowly)
        wait_for(run, step, process)
        process.send_signal(number)  # launchers pass SIGTERM on to their ranks
        process.communicate(timeout=300)
        saved = max(p.name for p in (run / "checkpoints").iterdir())
        assert step <= int(saved.removeprefix("step_")) < step + 8 and not saved.endswith("partial")
    finish(start(f"output={run.name}", "parallel.tensor=2", "data.workers=2", ranks=2))
    assert records(run) == records(straight[0])


def test_sigusr1_saves_and_ends_with_the_documented_code(start, workplace, slowly):
    run = workplace / "usr1"
    process = start("output=usr1", launcher=(), **slowly)
    wait_for(run, 3, process)
    process.send_signal(signal.SIGUSR1)
    out = finish(process, code=75)
    assert "saved" in out
    assert len(list((run / "checkpoints").glob("step_*"))) == 1


def kill_tree(process) -> None:
    """kill -9 to the launcher and everything it started: stopped first, so that nothing new is born
    meanwhile."""
    root = psutil.Process(process.pid)
    victims = {root}
    for signalled in (psutil.Process.suspend, psutil.Process.kill):
        victims |= set(root.children(recursive=True))
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                signalled(victim)
    process.communicate(timeout=300)


def test_a_second_job_is_refused_on_all_its_ranks_and_a_killed_one_does_not_block(start, workplace,
                                                                                   slowly):
    first = start("output=twice", **slowly)
    wait_for(workplace / "twice", 2, first)
    first.send_signal(signal.SIGSTOP)
    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    others = [start("output=twice", "parallel.tensor=2", RANK=str(rank), LOCAL_RANK=str(rank),
                    **ranks) for rank in range(2)]
    for other in others:
        _, err = other.communicate(timeout=300)
        assert other.returncode == 2
        assert f"twice is in use by process {first.pid} on {socket.gethostname()}" in err
    first.kill()
    finish(first, code=-signal.SIGKILL)
    finish(start("output=twice"))
    assert [r["step"] for r in records(workplace / "twice") if r["kind"] == "train"] == list(
        range(1, 25))


def test_a_run_is_moved_lengthened_and_equals_one_that_was_that_long(start, workplace):
    words, half = ["optimizer.decay=constant", "evaluate.every=12"], f"train.tokens={8 * 32 * 12}"
    finish(start("output=short", half, *words))
    (workplace / "short").rename(workplace / "longer")
    out = finish(start("output=longer", *words))
    finish(start("output=long", *words))
    assert "resumed from step_00000012" in out
    assert records(workplace / "longer") == records(workplace / "long")


def test_a_slow_disk_on_one_rank_is_survived(start, workplace):
    (workplace / "slow_disk.py").write_text("""
import os, time
from megatron_spdf.checkpoint import store
describe = store.describe
left = [8.0 if os.environ["RANK"] == "1" else 0.0]
def slow(path):
    time.sleep(left.pop() if left else 0.0)
    return describe(path)
store.describe = slow
""")
    out = finish(start("output=slow", "parallel.tensor=2", "checkpoint.every=0",
                       "fault_tolerance.hang_seconds=5",
                       ranks=2, SPDF_PLUGINS="slow_disk", PYTHONPATH=str(workplace)))
    assert "saved slow/checkpoints/step_00000024" in out


@pytest.fixture
def small_disk(workplace):
    """A directory on a file system of its own, and how to change that one's size in KiB."""
    place = workplace / "disk"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1024k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a file system")
    yield place, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(place)],
                                             check=True)
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_stops_the_run_and_loses_nothing(straight, start, small_disk):
    place, resize = small_disk
    bytes_of_one = sum(p.stat().st_size
                       for p in (straight[0] / "checkpoints" / "step_00000024").rglob("*"))
    resize(bytes_of_one * 3 // 2 // 1024)
    words = (f"output={place / 'run'}", "parallel.tensor=2",
             f"data.index_cache={straight[0].parent / 'index'}")  # the disk is for checkpoints
    out = finish(start(*words, "checkpoint.every=4", ranks=2), code=3)
    assert out.count("could NOT save") == 2 and "rank" in out and "bytes are free" in out
    assert "the last 2 saves failed" in out and "make room" in out
    assert [p.name for p in (place / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    resize(bytes_of_one * 10 // 1024)
    assert "resumed from step_00000004" in finish(start(*words, "checkpoint.every=4", ranks=2))
    assert records(place / "run") == records(straight[0])


def test_a_full_disk_under_the_log_ends_nothing_but_the_last_save(start, small_disk, slowly):
    place, resize = small_disk
    run = place / "run"
    resize(16_384)
    words = (f"output={run}", "checkpoint.every=0", "evaluate.every=0")
    process = start(*words, **slowly)
    wait_for(run, 2, process)
    process.send_signal(signal.SIGSTOP)
    with suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    process.send_signal(signal.SIGCONT)
    out = finish(process, code=3)
    assert "step 24/24" in out and "could NOT save" in out
    assert out.count(f"could NOT write {run}/log.jsonl: [Errno 28] No space left on device") == 1
    (place / "filler").unlink()
    finish(start(*words))
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == list(range(1, 25))


def test_a_damaged_checkpoint_is_named_and_refused(straight, start, workplace):
    import shutil

    shutil.copytree(straight[0], workplace / "damaged")
    newest = max((workplace / "damaged" / "checkpoints").iterdir())
    file = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    process = start("output=damaged", "parallel.tensor=2", ranks=2)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert file.name in err and "another content" in err and "Remove this checkpoint" in err


def test_dry_run_prints_the_plan_and_touches_nothing(workplace):
    command = [sys.executable, str(ROOT / "pretrain.py"),
               str(ROOT / "configs/pretrain/gpt3_xl_s75.yaml"), "--dry-run",
               "parallel.pipeline=2"]
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for said in ("301,989,888 of 1,207,959,552", "stage 1", "24,796", "75.0000%"):
        assert said in done.stdout
    assert not (workplace / "runs").exists()
