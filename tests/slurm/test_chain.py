"""launch/spdf.sh from text to the report, and an array that sweeps over the run it made."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

SWEEP = """
output: swept
data: {task: jsonl, path: pairs}
train: {epochs: 3, global_batch: 4, micro_batch: 2, precision: fp32}
optimizer: {lr: 1.0e-3}
engine: megatron
log: {tensorboard: false}
sweep: {optimizer.lr: [1.0e-3, 1.0e-4]}
"""
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=1G",
       "--output=%j.out")


@pytest.fixture(scope="module")
def chain(cluster):
    """Submits the chain; returns what it printed and job ids by name."""
    place = cluster.place
    (place / "pairs").mkdir()
    for split in ("train", "validation", "test"):
        pairs = [{"context": f"import {name}", "completion": f"{name}.py"}
                 for name in ("ast", "io", "re", "os")]
        (place / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n"
                                                                for pair in pairs))
    (place / "sweep.yaml").write_text(SWEEP)
    done = cluster.run(
        str(cluster.root / "launch/spdf.sh"), *ONE, "recipe.yaml", "jsonl", "output=chained",
        "train.tokens=2K",
        "data.train=pile/train", "data.valid=pile/valid", "preprocess.input=text/*.jsonl",
        "preprocess.output=pile",
        "preprocess.tokenizer=tokenizer", "preprocess.split=80,20,0", "jsonl.data.path=pairs",
        "finetune.train.precision=fp32", "finetune.train.epochs=1", "finetune.train.global_batch=4",
        "finetune.optimizer.warmup_steps=0", "finetune.engine=megatron",
        "score.beams=2", "score.max-new-tokens=4", "score.batch-size=4")
    names = ["preprocess", "pretrain", "finetune jsonl", "evaluate jsonl", "report"]
    assert [line.split(maxsplit=1)[1].split(":")[0]
            for line in done.stdout.splitlines()] == names, done.stdout
    return dict(zip(names, (line.split()[0] for line in done.stdout.splitlines()), strict=True))


def test_the_chain_ends_in_its_report(cluster, chain):
    for name, job in chain.items():
        cluster.until(lambda job=job: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED"),
                      name, seconds=600)
        said = next(cluster.place.glob(f"*{job}.out")).read_text()
        assert cluster.end_of(job) == ["COMPLETED 0"], f"{name}\n{said}"
    assert "chained_jsonl" in (cluster.place / "chained_report.html").read_text()
    scores = json.loads((cluster.place
                         / "chained_jsonl/evaluation/jsonl_test/scores.json").read_text())
    assert scores["task"] == "jsonl"


def test_an_array_sweeps_and_selects(cluster, chain):
    cluster.end_of(chain["pretrain"])
    job = cluster.sbatch("finetune_sweep.sh", "sweep.yaml", "chained", nodes="1",
                         options=("--array=0-2", "--output=array_%a.out"),
                         SPDF_FAULTS="swept/optimizer.lr=0.0001:train:1:0:WAIT")
    waits = cluster.place / "swept/optimizer.lr=0.0001-train-1-WAIT.done"
    cluster.until(waits.exists, "step 1 of the second element", f"{job}_1")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    cluster.until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job,
                                          check=False).stdout.strip(), "end",
                  seconds=600)
    said = [(cluster.place / f"array_{i}.out").read_text() for i in range(3)]
    found = json.loads((cluster.place / "swept/selection.json").read_text())
    assert [row["done"] for row in found["runs"]] == [True, True], said
    assert found["selected"] and found["unfinished"] == 0, said
    restarts = [cluster.field(f"{job}_{i}", "Restarts") for i in range(3)]
    assert restarts == ["0", "1", "0"], said
    assert (
        "--index 2: the sweep has 2 runs, 0 to 1 (sbatch --array=0-1)" in said[2]
    )


def test_the_chain_shows_its_commands_before_it_submits_them(cluster):
    before = cluster.run("squeue", "--noheader", "--states=all").stdout
    done = cluster.run(str(cluster.root / "launch/spdf.sh"), "--dry-run", "--nodes=2",
                       "recipe.yaml", "e2e,dart",
                       "output=dry", "dart.train.epochs=2", "finetune.train.epochs=3")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(line.startswith("'sbatch'") for line in lines)
    assert ["'--nodes=2'" in line for line in lines] == [True] + [False] * 5
    assert "'--dependency=afterok:<evaluate e2e>:<evaluate dart>'" in lines[-1]
    assert "'train.epochs=2'" in lines[3] and "'train.epochs=3'" not in lines[3]  # of the task
    assert "'train.epochs=3'" in lines[1] and "'train.epochs=2'" not in lines[1]
    assert cluster.run("squeue", "--noheader", "--states=all").stdout == before


@pytest.mark.parametrize(("words", "said"), [
    (("recipe.yaml",), "which recipe and which tasks?"),
    (("nowhere", "e2e"), "there is no recipe 'nowhere'; choose one of"),
    (("recipe.yaml", "e2e,nothing"), "there is no recipe 'nothing'; choose one of"),
    (("recipe.yaml", "e2e", "sparsity=2"), "sparsity.level=2"),
    (("recipe.yaml", "e2e", "finetune.optimizer.lr=fast"), "optimizer.lr='fast'"),
    (("recipe.yaml", "e2e", "finetune.output=elsewhere"), "output is given twice"),
    (("recipe.yaml", "e2e,dart", "dart.seed=1", "dart.seed=2"), "seed is given twice"),
])
def test_a_chain_that_cannot_work_submits_nothing(cluster, words, said):
    done = cluster.run(str(cluster.root / "launch/spdf.sh"), *words, check=False)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
