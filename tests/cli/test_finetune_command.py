"""finetune.py as users start it: by deepspeed, torchrun or alone, stopped, started again, and given
bad input."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked_ranks import FORKED, TORCHRUN
from test_pretrain import finish, records
from warm_commands import Warm, run_warm

from megatron_spdf.locks import DirectoryLock

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SPDF_DATA", ROOT.parent / "shared/data"))
RECIPE = {
    "checkpoint": "start", "output": "tuned", "seed": 5, "data": {"task": "e2e", "path": "e2e"},
    "train": {"epochs": 2, "global_batch": 8, "micro_batch": 4, "precision": "fp32",
              "label_smoothing": 0.1},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2}, "evaluate": {"every": 4}, "log": {"every": 1},
}
NAMES, FOODS, AREAS = ["Alimentum", "Aromi", "Clowns"], ["Italian", "Chinese",
                                                         "English"], ["city", "riverside"]


@pytest.fixture(scope="module")
def e2e(workplace):
    """Sixty training and ten validation rows of E2E's form: of the real data where they are, else
    of our own."""
    place, draw = workplace / "e2e", np.random.default_rng(0)
    place.mkdir()
    for split, count in (("trainset", 60), ("devset", 10)):
        if (DATA / f"e2e/{split}.csv").is_file():
            with (DATA / f"e2e/{split}.csv").open(newline="") as file:
                rows = [row for _, row in zip(range(count), csv.DictReader(file), strict=False)]
            rows = [(row["mr"], row["ref"]) for row in rows]
        else:
            rows = [own_row(draw) for _ in range(count)]
        write_rows(place / f"{split}.csv", rows)
    return place


def own_row(draw) -> tuple[str, str]:
    name, food, area = (draw.choice(values) for values in (NAMES, FOODS, AREAS))
    return f"name[{name}], food[{food}], area[{area}]", f"{name} serves {food} food at the {area}."


def write_rows(path: Path, rows: list[tuple[str, str]],
               header: tuple[str, str] = ("mr", "ref")) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def tune(start, workplace, e2e):
    """Starts finetune.py in the workplace: alone, or by a launcher with its words."""
    for name, level in (("start", 0.75), ("start_dense", 0.0)):
        finish(start(f"output={name}", f"sparsity={level}", "model.max_positions=512",
                     "train.sequence_length=32",
                     "train.tokens=2048", "evaluate.every=0", "checkpoint.every=0",
                     "optimizer.warmup_tokens=256"))
    (workplace / "tune.yaml").write_text(yaml.safe_dump(RECIPE))

    def tune(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen | Warm:
        command = [*launcher, str(ROOT / "finetune.py"), "tune.yaml", *words]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
               "CUDA_VISIBLE_DEVICES": ""}
        if launcher in ((), TWO):
            return Warm(command, workplace, env)
        return subprocess.Popen(command, cwd=workplace, env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    return tune


TWO = (*FORKED, "2")


def deepspeed() -> tuple[str, ...]:
    """DeepSpeed's launcher; the port it takes by itself is one for the machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return (sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2",
            "--master_port", port)


@pytest.fixture(scope="module")
def straight(tune, workplace):
    """An undisturbed run on two data-parallel ranks."""
    return workplace / "tuned_straight", finish(
        tune("output=tuned_straight", "parallel.data=2", launcher=(sys.executable, *TORCHRUN, "2")))


def losses(run: Path, kind: str = "train") -> list[float]:
    return [r["loss"] for r in records(run) if r["kind"] == kind]


def test_a_run_reports_what_it_does(straight):
    run, out = straight
    log = records(run)
    train = [r for r in log if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 17))
    assert [r["step"] for r in log if r["kind"] == "valid"] == [4, 8, 12, 16]
    assert train[-1]["loss"] < train[0]["loss"] - 0.2
    assert {r["sparsity"] for r in train} == {0.0}
    assert train[1]["lr"] == pytest.approx(1e-3) and train[-1]["lr"] == pytest.approx(0.0, abs=1e-9)
    # an epoch reads what an epoch reads
    assert train[0]["tokens"] < train[7]["tokens"] == train[15]["tokens"] / 2
    for said in ("starting from step 8 of the run start", "dense, revived weights start at zero",
                 "e2e: 60 training and 10 validation pairs", "2 epochs of 8 steps",
                 "deepspeed ZeRO-1", "saved"):
        assert said in out
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["checkpoint"] == "start" and recipe["train"]["epochs"] == 2
    assert {p.name for p in run.iterdir()} == {"recipe.yaml", "log.jsonl", "tensorboard",
                                               "checkpoints", "contents.json", "lock.1"}


def test_the_best_and_the_last_checkpoint_are_kept_and_the_tools_read_the_best(straight, workplace):
    run, _ = straight
    best = json.loads((run / "checkpoints/best.json").read_text())
    valid = {r["step"]: r["loss"] for r in records(run) if r["kind"] == "valid"}
    step = min(valid, key=valid.get)
    assert best == {"checkpoint": f"step_{step:08d}", "loss": valid[step]}
    assert {p.name for p in (run / "checkpoints").glob("step_*")} == {best["checkpoint"],
                                                                      "step_00000016"}
    for tool, words, said in (("inspect_checkpoint.py", ["tuned_straight", "--verify"],
                               f"step {step},"),
                              ("convert_checkpoint.py", ["to-hf", "tuned_straight", "tuned_hf"],
                               best["checkpoint"])):
        done = run_warm([ROOT / "tools" / tool, *words], workplace, dict(os.environ))
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


def test_deepspeeds_launcher(straight, tune, workplace):
    run = workplace / "zero3"
    finish(tune(f"output={run.name}", "parallel.data=2", "parallel.zero_stage=3",
                launcher=deepspeed()))
    assert losses(run) == pytest.approx(losses(straight[0]), rel=1e-4)
    assert losses(run, "valid") == pytest.approx(losses(straight[0], "valid"), rel=1e-4)


def test_tensor_parallel_with_a_deepspeed_file(straight, tune, workplace):
    finish(tune("output=tuned_tp2", "parallel.tensor=2", "parallel.zero_stage=2",
                f"deepspeed={ROOT}/configs/deepspeed/zero2.json", launcher=TWO))
    assert losses(workplace / "tuned_tp2") == pytest.approx(losses(straight[0]), rel=1e-4)


def test_one_process_of_the_other_engine(straight, tune, workplace):
    finish(tune("output=tuned_megatron", "engine=megatron"))
    assert losses(workplace / "tuned_megatron") == pytest.approx(losses(straight[0]), rel=1e-4)


def test_the_sparse_mode(tune, workplace):
    out = finish(tune("output=tuned_sparse", "mode=sparse"))
    assert "sparse, the mask holds" in out
    assert {r["sparsity"] for r in records(workplace / "tuned_sparse") if r["kind"]
            == "train"} == {0.75}


def test_stopped_twice_by_a_signal_equals_straight(straight, tune, workplace):
    run = workplace / "tuned_stopped"
    for step in (3, 10):
        process = tune("output=tuned_stopped", "parallel.data=2", launcher=TWO)
        while not ((run / "log.jsonl").exists()
                   and f'"step": {step},' in (run / "log.jsonl").read_text()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    finish(tune("output=tuned_stopped", "parallel.data=2", launcher=TWO))
    assert records(run) == records(straight[0])


def test_fine_tuning_goes_on_from_fine_tuning_and_from_hugging_face(straight, tune, workplace):
    """`tuned_hf` is what test_the_best_... made."""
    first = {}
    for start in ("tuned_straight", "tuned_hf"):
        finish(tune(f"checkpoint={start}", f"output=again_{start}", "train.epochs=1"))
        first[start] = losses(workplace / f"again_{start}")[0]
    assert first["tuned_straight"] == pytest.approx(first["tuned_hf"], rel=1e-4)
    assert first["tuned_straight"] < losses(straight[0])[0] - 0.2


def refused(process, workplace, output="tuned"):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err and not (workplace / output).exists()
    return err


LONG = "serves food " * 400


@pytest.mark.parametrize(("words", "said"), [
    (["checkpoint=nowhere"], ["nowhere holds no weights", "run directory"]),
    (["checkpoint=start_dense", "mode=sparse"],
     ["mode=sparse keeps the mask", "start_dense", "mode=dense"]),
    (["data.path=nowhere"], ["nowhere does not exist", "train"]),
    (["parallel.data=2"], ["needs 2 processes", "python started 1"]),
    (["train.sequence_length=1024"], ["train.sequence_length=1024", "model.max_positions=512"]),
    (["train.sequence_length=16"], ["e2e, train split, example", "does not fit the window of 16"]),
    (["optimizer.warmup_steps=16"], ["optimizer.warmup_steps=16", "16 steps"]),
    (["deepspeed={root}/configs/deepspeed/zero3.json"],
     ["zero_optimization.stage=3", "parallel.zero_stage makes it 1"]),
    (["output=start"], ["start/recipe.yaml cannot be read as a recipe", "choose another output"]),
    (["output=tuned_straight", "optimizer.lr=2e-3"],
     ["optimizer.lr is 0.001 there and 0.002 here"]),
])
def test_bad_input_is_named(straight, ask_tune, workplace, words, said):
    message = refused(ask_tune(*(word.replace("{root}", str(ROOT)) for word in words)), workplace)
    for part in said:
        assert part in message


@pytest.mark.parametrize(("rows", "header", "said"), [
    ([("name[A]", "fine")], ("meaning", "ref"), ["trainset.csv, line 1", "no column mr"]),
    ([("name[A]", "fine"), ("nonsense", "no")], ("mr", "ref"),
     ["trainset.csv, line 3", "'nonsense'"]),
    ([], ("mr", "ref"), ["the train split of e2e must not be empty"]),
    ([("name[A]", "fine"), ("name[B]", LONG)], ("mr", "ref"),
     ["example 2 ('name : B')", "does not fit the window"]),
])
def test_bad_data_are_named_with_file_and_place(tune, ask_tune, workplace, e2e, tmp_path, rows,
                                                header, said):
    shutil.copytree(e2e, tmp_path / "bad")
    write_rows(tmp_path / "bad/trainset.csv", rows, header)
    message = refused(ask_tune(f"data.path={tmp_path}/bad"), workplace)
    for part in said:
        assert part in message


def test_a_start_without_its_tokenizer_is_refused(tune, workplace):
    shutil.copytree(workplace / "start", workplace / "bare")
    (newest,) = (workplace / "bare/checkpoints").iterdir()
    shutil.rmtree(newest / "tokenizer")
    assert "tokenizer" in refused(tune("checkpoint=bare"), workplace)
    files = json.loads((newest / "files.json").read_text())
    kept = {name: entry for name, entry in files.items() if not name.startswith("tokenizer/")}
    (newest / "files.json").write_text(json.dumps(kept))
    message = refused(tune("checkpoint=bare"), workplace)
    assert "has no tokenizer" in message and "was trained with" in message


def test_dry_run_prints_what_would_run_and_touches_nothing(tune, workplace, tmp_path):
    for split in ("train", "validation"):
        record = {"context": "return self " * 40, "completion": "None"}
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(record) + "\n") * 9)
    words = ("--dry-run", "output=dry", "train.sequence_length=32", "data.task=jsonl",
             f"data.path={tmp_path}")
    out = finish(tune(*words))
    assert (
        "9 training contexts lost their beginning to fit 32 tokens" in out
        and "layout: 1 rank =" in out
    )
    assert not (workplace / "dry").exists()


def test_a_run_that_another_job_has_is_refused(tune, ask_tune, workplace):
    lock = DirectoryLock(workplace / "held", pytest.fail)
    lock.take()
    for words in ([], ["--preflight"]):
        refused = ask_tune("output=held", *words)
        assert refused.returncode == 2 and "held is in use by process" in refused.err.getvalue()
    lock.let_go()
    assert ask_tune("output=held", "--preflight").returncode == 0
    assert ask_tune("output=held", "--preflight").returncode == 0
