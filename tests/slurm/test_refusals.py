"""What cannot work ends at once with one line and its remedy; nothing is started again."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

REFUSED = {  # words, environment, what is said
    "no GPU": ([], {"SPDF_DEVICE": "gpu"},
               "has no GPU (nvidia-smi -L finds none within 60 s); ask for some with "
               "--gpus-per-node"),
    "no recipe": (["nowhere.yaml"], {}, "there is no recipe "),
    "world": (["recipe.yaml", "parallel.tensor=2", "output=r1"], {},
              "1 processes do not make up whole replicas"),
    "fixed world": (["recipe.yaml", "parallel.data=2", "output=r1"], {}, "needs 2 processes"),
    "unwritable": (["recipe.yaml", "output=recipe.yaml/run"], {},
                   "recipe.yaml is a file; choose another output"),
    "no run": (["recipe.yaml", "output=data"], {}, "is not a run directory"),
    "head node": ([], {"MASTER_ADDR": "nowhere"},
                  "the head node 'nowhere' cannot be resolved on node"),
    "busy port": ([], {"MASTER_ADDR": "node1", "MASTER_PORT": "6818"},
                  "port 6818 of the head node node1 is taken"),
    "no Python": ([], {"SPDF_PYTHON": "/nowhere/python"},
                  "there is no Python at /nowhere/python; export SPDF_PYTHON"),
}


@pytest.fixture(scope="module")
def refused(cluster):
    """Submits all of them; returns name -> job."""
    return {name: cluster.sbatch("pretrain_gpt2small.sh", *words, nodes="1", **env)
            for name, (words, env, _) in REFUSED.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_rank_is_started(cluster, refused, name):
    job = refused[name]
    assert cluster.end_of(job) == ["FAILED 2"], cluster.output(job)
    out = [line for line in cluster.output(job).splitlines() if not line.startswith("==")]
    assert REFUSED[name][2] in " ".join(out)
    # a recipe's broken rules have a line each
    assert len(out) <= 3 and "Traceback" not in cluster.output(job), out
    assert cluster.field(job, "Restarts") == "0"
    assert not (cluster.place / "r1").exists()


@pytest.mark.parametrize("script", ["finetune.sh", "finetune_sweep.sh", "evaluate.sh"])
def test_a_forgotten_task_is_asked_for(cluster, script):
    job = cluster.sbatch(script, nodes="1", options=("--array=0",) if "sweep" in script else ())
    job += "_0" if "sweep" in script else ""
    assert cluster.end_of(job) == ["FAILED 2"]
    assert "which task and which run? write: sbatch" in cluster.output(job.partition("_")[0])


@pytest.mark.parametrize("script",
                         ["pretrain_gpt2small.sh", "finetune.sh", "evaluate.sh", "tool.sh"])
def test_outside_of_a_job(cluster, script):
    done = cluster.run(str(cluster.root / "launch" / script), "x", "y", check=False)
    assert done.returncode == 2
    assert (
        done.stderr.count("\n") == 1
        and f"not in a Slurm job; submit it: sbatch launch/{script}" in done.stderr
    )
