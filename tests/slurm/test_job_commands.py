"""All that a job hands on: headers that sbatch reads, options of its commands, the environment of
ranks, and every command in turn. Slurm and Python are stand-ins, so that nothing is waited for."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUBMITTED = sorted(set(ROOT.glob("launch/*.sh")) - {
    ROOT / "launch" / name for name in ("common.sh", "spdf.sh", "site.sh")})
SAY = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" "" >>"$SAID"
"""
STAND_INS = {
    "srun": SAY + 'while [[ $1 = --* ]]; do shift; done\nexec "$@"\n',
    "apptainer": SAY + 'while [[ $1 != *.sif ]]; do shift; done\nshift\nexec "$@"\n',
    "sbatch": SAY + 'echo "$((100 + $(grep -cx sbatch "$SAID")));cluster"\n',
    "scontrol": '#!/bin/bash\n[[ "$1 $2" != "show hostnames" ]] || echo localhost\n',
    "nvidia-smi": "#!/bin/bash\n",
    "python": SAY + """
case " $* " in
  *" --words "*) printf 'a library\\0seed=4\\0output=swept/seed=4\\0' ;;
  *" --preflight "* | *" --print-output "*) env -0 >"$SAID.checked"; printf '\\0runs/mine\\0' ;;
  *) env -0 >"$SAID.rank" ;;
esac
"""}


@pytest.fixture
def job(tmp_path):
    """Runs a script as job 40007; returns the commands that it ran, each a list of words, and what
    the environment of its check or of its last command has that was not given."""
    said = tmp_path / "said"
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, of: str = "rank", **env: str):
        given = {k: v for k, v in os.environ.items() if not k.startswith((
            "SLURM", "MASTER", "SPDF", "OMP", "CUDA", "NCCL", "TORCH", "PYTHON"))}
        given |= {"PATH": f"{tmp_path}:{given['PATH']}", "SAID": str(said), "SLURM_JOB_ID": "40007",
                  "SPDF_PYTHON": str(tmp_path / "python"), "SPDF_DEVICE": "cpu",
                  "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", **env}
        done = subprocess.run([str(ROOT / "launch" / script), *words], cwd=tmp_path, env=given,
                              text=True, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        left = Path(f"{said}.{of}")
        there = left.read_text().split("\0")[:-1] if left.exists() else []
        found = dict(pair.split("=", 1) for pair in there)
        return ([command.split("\n") for command in said.read_text().rstrip("\n").split("\n\n")],
                {k: v for k, v in found.items()
                 if given.get(k) != v and k not in ("SHLVL", "_", "PWD", "OLDPWD")})
    return run


NETWORK = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
           "TORCH_FR_BUFFER_SIZE": "2000", "NCCL_DEBUG": "WARN"}
MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "20007"}  # 20000 + 40007 % 20000
OURS = {"SPDF_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(("device", "hidden"), [("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("gpu", {})])
def test_the_environment_of_ranks_is_this_and_nothing_else(job, device, hidden):
    common = {**NETWORK, **MEETING, **OURS, "OMP_NUM_THREADS": "1", **hidden}
    assert job("finetune.sh", "e2e", "start", SPDF_DEVICE=device)[1] == common
    checked = job("finetune.sh", "e2e", "start", SPDF_DEVICE=device, of="checked")[1]
    assert checked == {**common, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}


def test_what_a_user_sets_reaches_the_ranks(job):
    own = {**dict.fromkeys([*NETWORK, "OMP_NUM_THREADS"], "7"), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": "21"}
    found = job("finetune.sh", "e2e", "start", **own, PYTHONPATH="mine")[1]
    assert found == {**OURS, "PYTHONPATH": f"{ROOT}:mine", "CUDA_VISIBLE_DEVICES": ""}


RECIPE = f"{ROOT}/configs/finetune/e2e.yaml"
RANKS = ["--nodes=2", "--ntasks=4", "--distribution=block", "--kill-on-bad-exit=0", "--wait=30",
         "--label"]


def test_every_command_of_an_element_of_a_sweep(job, tmp_path):
    """The words of the element, a check of its run, its ranks, and the choice once it has ended."""
    python, finetune = str(tmp_path / "python"), str(ROOT / "finetune.py")
    sweep = [str(ROOT / "tools/sweep.py"), RECIPE, "checkpoint=start", "parallel.data=auto",
             "seed=3"]
    element = [finetune, RECIPE, "seed=4", "output=swept/seed=4"]
    commands, _ = job("finetune_sweep.sh", "e2e", "start", "seed=3", SLURM_ARRAY_TASK_ID="5",
                      SLURM_ARRAY_JOB_ID="40000", SPDF_SRUN="--mpi=none --cpu-bind=none",
                      SLURM_CPUS_PER_TASK="6")
    assert commands == [
        ["python", *sweep, "--index", "5", "--words"], ["python", *element, "--preflight"],
        ["srun", *RANKS, "--cpus-per-task=6", "--mpi=none", "--cpu-bind=none", python, *element],
        ["python", *element], ["python", *sweep, "--select"]]


@pytest.mark.parametrize(("script", "words", "ranks", "command"), [
    ("pretrain_gpt3xl.sh", ["sparsity=0.5"], RANKS,
     ["pretrain.py", f"{ROOT}/configs/pretrain/gpt3_xl_s75.yaml", "parallel.data=auto",
      "sparsity=0.5"]),
    ("pretrain_llama.sh", ["mine.yaml", "parallel.data=2"], RANKS,
     ["pretrain.py", "mine.yaml", "parallel.data=2"]),
    ("evaluate.sh", ["e2e", "runs/mine", "--beams=4"], RANKS,
     ["tools/evaluate.py", "runs/mine", "--task=e2e", "--beams=4"]),
    ("tool.sh", ["report", "runs/mine"], ["--nodes=1", "--ntasks=1", *RANKS[2:]],
     ["tools/report.py", "runs/mine"])])
def test_ranks_run_the_script_on_the_words_that_are_given(job, tmp_path, script, words, ranks,
                                                          command):
    *_, srun, there = job(script, *words)[0]
    command = [f"{ROOT}/{command[0]}", *command[1:]]
    assert srun == ["srun", *ranks, str(tmp_path / "python"), *command]
    assert there == ["python", *command]


def test_a_container_of_pyxis_is_entered_by_every_command(job, tmp_path):
    mounts = ",".join(f"{place}:{place}" for place in (ROOT, tmp_path, "/data"))
    inside = ["--container-image=image", f"--container-mounts={mounts}",
              f"--container-workdir={tmp_path}", "--no-container-mount-home"]
    commands, _ = job("finetune.sh", "e2e", "start", SPDF_CONTAINER="image", SPDF_MOUNTS="/data",
                      SLURMD_NODENAME="node7")
    once, ranks = (words[1:words.index(str(tmp_path / "python"))] for words in commands
                   if words[0] == "srun")
    assert once == ["--nodes=1", "--ntasks=1", "--overlap", "--nodelist=node7", *inside]
    assert ranks == [*RANKS, *inside]


@pytest.mark.parametrize(("device", "driver"), [("cpu", []), ("gpu", ["--nv"])])
def test_a_container_of_apptainer_is_entered_by_every_command(job, tmp_path, device, driver):
    commands, _ = job("finetune.sh", "e2e", "start", SPDF_CONTAINER="my.sif", SPDF_MOUNTS="/data",
                      SPDF_DEVICE=device)
    entered = [words[1:words.index("my.sif") + 1] for words in commands if words[0] == "apptainer"]
    assert entered == 2 * [["exec", *driver, f"--bind={ROOT}", f"--bind={tmp_path}", "--bind=/data",
                            "--pwd", str(tmp_path), "my.sif"]]


def test_every_job_of_a_chain_has_its_words_and_waits_for_those_before_it(job):
    commands, _ = job(
        "spdf.sh", "--account=me", "gpt2_small_s75", "e2e,dart", "--nodes=4", "sparsity=0.5",
        "preprocess.input=a b/*.jsonl", "preprocess.tokenizer=t", "score.beams=2",
        "score.split=validation", "finetune.train.epochs=3", "dart.train.epochs=2", "seed=5",
        "e2e.seed=6")

    def submitted(name: str, after: str, *words: str) -> list[str]:
        held = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        place = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        return ["sbatch", "--parsable", *held, f"--job-name={name}", *words[:place],
                f"{ROOT}/launch/{words[place]}", *words[place + 1:]]

    own, scored = "--account=me", ("--beams=2", "--split=validation")
    assert [words for words in commands if words[0] == "sbatch"] == [
        submitted("preprocess", "", "tool.sh", "preprocess_data", "--input=a b/*.jsonl",
                  "--tokenizer=t"),
        submitted("pretrain", "101", own, "--nodes=4", "pretrain_gpt2small.sh",
                  f"{ROOT}/configs/pretrain/gpt2_small_s75.yaml", "sparsity=0.5", "seed=5"),
        submitted("finetune_e2e", "102", own, "finetune.sh", "e2e", "runs/mine",
                  "output=runs/mine_e2e", "train.epochs=3", "seed=6"),
        submitted("evaluate_e2e", "103", own, "evaluate.sh", "e2e", "runs/mine_e2e", *scored),
        submitted("finetune_dart", "102", own, "finetune.sh", "dart", "runs/mine",
                  "output=runs/mine_dart", "train.epochs=2"),
        submitted("evaluate_dart", "105", own, "evaluate.sh", "dart", "runs/mine_dart", *scored),
        submitted("report", "104:106", "tool.sh", "report", "runs/mine", "runs/mine_e2e",
                  "runs/mine_dart", "--output=runs/mine_report.html")]


@pytest.mark.parametrize(("recipe", "script"), [
    ("gpt3_xl_s50", "gpt3xl"), ("gpt3_6b7_s90", "gpt3_6b7"), ("llama_tiny", "llama"),
    ("gpt_tiny", "gpt2small"), ("/away/llama_mine.yaml", "llama")])
def test_a_chain_takes_the_nodes_of_its_model(job, recipe, script):
    commands, _ = job("spdf.sh", recipe, "e2e")
    assert next(words for words in commands if words[0] == "sbatch")[3] == (
        f"{ROOT}/launch/pretrain_{script}.sh")


NODES = {"pretrain_gpt3xl.sh": "2", "pretrain_gpt3_6b7.sh": "8", "pretrain_llama.sh": "2"}


@pytest.mark.parametrize("script", SUBMITTED, ids=lambda script: script.name)
def test_a_header_asks_for_a_rank_on_each_gpu_a_warning_and_another_start(script):
    """And for one output of all starts; a warning that leaves two minutes or more to save in."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.M)
    asked, tool, sweep = dict(found), script.name == "tool.sh", "sweep" in script.name
    assert len(asked) == len(found)
    ranks = {"ntasks-per-node": "1"} if tool else {"ntasks-per-node": "8", "gpus-per-node": "8"}
    fixed = {"nodes": NODES.get(script.name, "1"), **ranks, "requeue": "", "open-mode": "append",
             "output": "%x-%A_%a.out" if sweep else "%x-%j.out", "mem": "64G" if tool else "0",
             **({"array": "0-11"} if sweep else {})}
    free = {key: asked.pop(key, "") for key in ("job-name", "cpus-per-task", "time", "signal")}
    assert asked == fixed and re.fullmatch(r"\w+", free["job-name"])
    assert re.fullmatch(r"\d+:00:00", free["time"]) and int(free["cpus-per-task"]) >= 8
    assert int(re.fullmatch(r"B:USR1@(\d+)", free["signal"])[1]) >= 120
