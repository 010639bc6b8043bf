"""Words of a user reach the commands of a job as they are: nothing in them is run, cut or taken for
an option. Slurm's commands are stand-ins, so that no cluster is needed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_spdf.recipe.finetune import load_finetune
from megatron_spdf.recipe.load import read_value, save_recipe, write_value
from megatron_spdf.runs.grid import combinations
from megatron_spdf.runs.run_dir import splits_of
from megatron_spdf.runs.selection import trials

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # starts launch scripts
SRUN = """#!/bin/bash
while [[ $1 = --* ]]; do echo "option $1" >>"$SAID"; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") echo "${NODE:-localhost}" ;;
  "show node") echo "NodeName=$3 Arch=x86_64
   NodeAddr=127.0.0.1 NodeHostName=nobody-knows Version=22.05" ;;
  "show job") echo "JobId=$3 JobName=JobState=PENDING
   JobState=RUNNING Reason=None" ;;
  "show step") [[ " $STEPS " = *" $3 "* ]] ;;
  requeue*) echo "requeued" >>"$SAID"; exit 1 ;;
esac
"""
# Stands in for Python: says the words that the entry points are given; tools/sweep.py is itself.
PYTHON = """#!{python}
import os, runpy, signal, sys, time
words = sys.argv[1:]
if words[0].endswith("sweep.py") and "--select" not in words:
    sys.argv = words
    sys.path.insert(0, os.environ["PYTHONPATH"])
    runpy.run_path(words[0], run_name="__main__")
elif "--preflight" in words:
    print("a library says something", "the run", "", sep="\\0", end="")
    print(*sorted(k + "=" + os.environ[k] for k in ("WORLD_SIZE", "MASTER_ADDR")),
          file=open(os.environ["SAID"], "a"))
elif "--select" not in words:
    if (name := os.environ.get("STOPPED_BY")) and "restarts" not in words[1]:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which the script sends on
        os.kill(os.getppid(), getattr(signal, name))
        time.sleep(0.2)
    print(repr(words), file=open(os.environ["SAID"], "a"))
    sys.exit(int("restarts" not in words[1] and os.environ.get("ENDS", "0")))
"""
RECIPE = {"checkpoint": "start", "output": "swept", "data": {"task": "jsonl", "path": "data"},
          "train": {"global_batch": 8, "micro_batch": 2}, "optimizer": {"lr": 1e-4}}


@pytest.fixture
def job(tmp_path):
    """Runs a script of launch/ as a job of one node; returns what it did and the words of its last
    command."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL),
                       ("python", PYTHON.format(python=sys.executable))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"

    def run(script: str, *words: str, **env: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        said.write_text("")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
        done = subprocess.run(
            [str(ROOT / "launch" / script), *words], cwd=tmp_path, text=True, check=False,
            capture_output=True, timeout=60,
            env={**kept, "PATH": f"{tmp_path}:{kept['PATH']}", "SAID": str(said), "STEPS": "",
                 "SPDF_PYTHON": str(tmp_path / "python"), "SPDF_DEVICE": "cpu",
                 "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
                 "SLURMD_NODENAME": "localhost", **env})
        return done, said.read_text().splitlines()
    return run


def words_of(lines: list[str]) -> list[str]:
    return ast.literal_eval(lines[-1])


def write_recipe(tmp_path: Path, sweep: dict, **keys: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **keys, "sweep": sweep}))


NASTY = ["x\n$(touch marker)", "x\n; touch marker #", "x\0y", "x\x1b]0;y\x07", "x\r", "x\u2028y"]


@pytest.mark.parametrize("value", NASTY)
def test_a_value_to_try_with_a_control_character_is_refused(value):
    for axes in ({"data.path": {"label": {"data.path": ["a", {"b": value}]}}},
                 {"data.path": {value: {"data.path": "a"}}}, {value: {"a": {"data.path": "a"}}}):
        with pytest.raises(ValueError, match="cannot be printed"):
            list(combinations(axes, "out"))


def test_a_refused_value_runs_nothing(job, tmp_path):
    write_recipe(tmp_path, {"data.path": [NASTY[0]]})
    done, said = job("finetune_sweep.sh", "recipe.yaml", "start")
    assert done.returncode == 2 and "cannot be printed" in done.stderr, done.stderr
    assert not said and not list(tmp_path.rglob("marker*"))


ODD = ["$(touch marker)", "`touch marker`", "a'; touch marker; '", 'a"; touch marker; "', "a b  c",
       "exp #2", "[a]", "a: b", "*", "true", "2024", "--dry", "é", "\\n", "a\\", "$HOME", "!!",
       "'", "&a b", "- a", "null", " a ", "{a: b}", "%", "@", "a,b=c"]


def test_values_to_try_arrive_as_they_are(tmp_path):
    """Each as the value of a field of text, which an override's text means to the last letter."""
    write_recipe(tmp_path, {"data.path": ODD}, output="out #1")
    path = tmp_path / "recipe.yaml"
    found = trials(load_finetune(path))
    made = [load_finetune(path, trial.words) for trial in found]
    assert [recipe.data.path for recipe in made] == ODD
    assert [recipe.output for recipe in made] == [str(trial.output) for trial in found]
    assert len({recipe.output for recipe in made}) == len(ODD)
    assert all(recipe.output.startswith("out #1/data.path=") for recipe in made)


def test_two_values_with_one_directory_are_refused(tmp_path):
    write_recipe(tmp_path, {"data.path": ["a/b", "a_b"]})
    with pytest.raises(ValueError, match="would both write to"):
        trials(load_finetune(tmp_path / "recipe.yaml"))
    write_recipe(tmp_path, {"data.path": ["a" * 300]})
    with pytest.raises(ValueError, match="a directory name of 310 bytes"):
        trials(load_finetune(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("value", ["$(touch marker)", "a'; touch marker; '#2 \\"])
def test_a_job_gets_the_words_of_its_element(job, tmp_path, value):
    write_recipe(tmp_path, {"data.path": ["other", value]}, output=f"out {value}")
    done, said = job("finetune_sweep.sh", "recipe.yaml", "start", "seed=3",
                     SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="7")
    assert done.returncode == 0, done.stderr
    words = words_of(said)
    assert words[1:6] == ["recipe.yaml", "checkpoint=start", "parallel.data=auto", "seed=3",
                          f"data.path={value}"]
    assert words[6] == f"output=out {value}/data.path={value}"
    assert not list(tmp_path.rglob("marker*"))


def test_an_element_beyond_the_sweep_is_refused_with_the_array_to_ask_for(job, tmp_path):
    write_recipe(tmp_path, {"optimizer.lr": [1e-4, 1e-5]})
    done, said = job("finetune_sweep.sh", "recipe.yaml", "start", SLURM_ARRAY_TASK_ID="2",
                     SLURM_ARRAY_JOB_ID="7")
    assert done.returncode == 2 and not said
    assert "--index 2: the sweep has 2 runs, 0 to 1 (sbatch --array=0-1)" in done.stderr


def test_what_a_library_prints_is_no_word(job, tmp_path):
    done, said = job("finetune.sh", "e2e", "start", ENDS="1")
    assert done.returncode == 1 and "requeued" in said, done.stderr
    restarts = next(line for line in said if "restarts" in line)
    assert ast.literal_eval(restarts)[-1] == "the run"


@pytest.mark.parametrize(("script", "words", "codes", "signal"), [
    ("evaluate.sh", ("e2e", "run"), (0, 1), "SIGUSR1"),
    ("tool.sh", ("report", "run"), (0, 1), "SIGTERM"),
    ("finetune.sh", ("e2e", "start"), (0, 1, 2, 3, 75), "SIGUSR1")])
@pytest.mark.parametrize("stopped", [False, True])
def test_what_has_ended_well_or_for_a_reason_is_not_started_again(job, script, words, codes, signal,
                                                                  stopped):
    """A stopped run of any script is, and a run that trains after every end without a reason."""
    for code in codes:
        done, said = job(script, *words, ENDS=str(code), STOPPED_BY=signal if stopped else "")
        asked = code in (1, 75) and (stopped or script == "finetune.sh")
        assert ("requeued" in said) == asked, (code, done.stderr)
        assert done.returncode == (1 if asked else code)  # the stand-in's requeue fails


@pytest.mark.parametrize(("env", "more"), [
    ({"SPDF_EXIT_GRACE_SECONDS": "8"}, []),
    ({"SPDF_EXIT_GRACE_SECONDS": "0"}, ["--kill-on-bad-exit=1"]),  # not one second
    ({"SPDF_EXIT_GRACE_SECONDS": "30", "SLURM_CPUS_PER_TASK": "6"}, ["--cpus-per-task=6"])])
def test_ranks_start_side_by_side_and_end_as_long_after_the_first_as_asked(job, env, more):
    done, said = job("finetune.sh", "e2e", "start", SLURM_NTASKS="2", **env)
    assert done.returncode == 0, done.stderr
    options = [line.removeprefix("option ") for line in said if line.startswith("option ")]
    assert options[options.index("--ntasks=2") - 1:] == [
        "--nodes=1", "--ntasks=2", "--distribution=block", "--kill-on-bad-exit=0",
        f"--wait={env['SPDF_EXIT_GRACE_SECONDS']}", "--label", *more]


@pytest.mark.parametrize("run", ["--force", "-h", "--output=x", "a b", "$(touch marker)", "--",
                                 "a\nb\n"])
def test_a_run_is_no_option(job, run):
    done, said = job("evaluate.sh", "e2e", run, "--beams", "4")
    assert done.returncode == 0, done.stderr
    path = f"./{run}" if run.startswith("-") else run
    assert words_of(said)[1:] == [path, "--task=e2e", "--beams", "4"]


def test_a_recipe_is_no_option(job, tmp_path):
    done, said = job("finetune.sh", "--help.yaml", "start")
    assert done.returncode == 0 and words_of(said)[1] == "./--help.yaml", done.stderr


@pytest.mark.parametrize("env, tasks, nodes", [
    ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "8"}, 4, 1),
    ({"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "2"}, 3, 2),
    ({"SLURM_NTASKS": "", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "2"}, 4, 2),
    ({"SLURM_NTASKS": ""}, 1, 1),
])
def test_as_many_ranks_start_as_the_job_has_tasks(job, env, tasks, nodes):
    done, said = job("finetune.sh", "e2e", "start", **env)
    assert done.returncode == 0, done.stderr
    assert f"option --ntasks={tasks}" in said and f"option --nodes={nodes}" in said
    assert f"WORLD_SIZE={tasks}" in said[0]


def test_a_node_whose_name_is_not_the_hosts(job):
    done, said = job("finetune.sh", "e2e", "start", NODE="a-name-of-slurms.invalid",
                     SLURMD_NODENAME="a-name-of-slurms.invalid", SPDF_CONTAINER="image")
    assert done.returncode == 0, done.stderr
    assert "option --nodelist=a-name-of-slurms.invalid" in said
    assert any("MASTER_ADDR=127.0.0.1 " in line for line in said), said


@pytest.mark.parametrize("env, said", [
    ({"SLURM_HET_SIZE": "2"}, "job 7 is heterogeneous (2 components)"),
    ({"SLURM_STEP_ID": "0", "STEPS": "7.0"}, "this shell is step 0 of job 7 (srun --pty)"),
])
def test_where_ranks_would_wait_for_ever_the_script_refuses(job, env, said):
    done, lines = job("finetune.sh", "e2e", "start", **env)
    assert done.returncode == 2 and said in done.stderr and not lines, done.stderr


@pytest.mark.parametrize("step", ["4294967290", "0"])  # salloc's shell; that of a job it submitted
def test_shells_that_hold_no_cpus_start_ranks(job, step):
    done, said = job("finetune.sh", "e2e", "start", SLURM_STEP_ID=step)
    assert done.returncode == 0 and words_of(said)[1].endswith("e2e.yaml"), done.stderr


def test_no_script_evaluates_a_text():
    """Nor reads YAML with anything but the package."""
    for script in sorted((ROOT / "launch").glob("*.sh")):
        code = re.sub(r"(^|\s)#.*", "", script.read_text(), flags=re.M)
        assert not re.search(r"\beval\b|\b(ba)?sh -c\b|\$\{[^}]*@[PEA]\}", code), script
        assert not re.search(r"\b(sed|awk|grep|cut)\b[^\n]*\.ya?ml", code.replace(
            r"echo *.yaml | sed 's/\.yaml//g'", "")), script


def test_a_chain_names_every_job_after_the_whole_output(job, tmp_path):
    output = "--it's an exp #2: [x] \"y\" $(touch marker) " + "deep/" * 30
    done, _ = job("spdf.sh", "--dry-run", "gpt2_small_s75", "e2e", f"output={output}",
                  SPDF_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    lines = [subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True,
                            text=True, check=True).stdout.split("\0")[:-1]
             for line in done.stdout.splitlines()]
    run = f"./{output}" if output.startswith("-") else output
    pretrain, finetune, evaluate, report = lines
    assert f"output={output}" in pretrain
    assert f"output={run}_e2e" in finetune and finetune[-2] == run
    assert evaluate[-1] == f"{run}_e2e"
    assert report[-3:] == [run, f"{run}_e2e", f"--output={run}_report.html"]


def test_a_run_is_scored_on_its_own_splits_whatever_their_path(tmp_path):
    """As long as it may be, or odd."""
    path = "data/exp #2: it's \"x\" " + "deep/" * 50
    recipe = load_finetune(ROOT / "configs/finetune/e2e.yaml",
                           ["checkpoint=x", f"data.path={path}"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert str(splits_of(tmp_path, "e2e")) == path.removesuffix("/")
    assert splits_of(tmp_path, "dart") is None and splits_of(tmp_path / "none", "e2e") is None
    (tmp_path / "recipe.yaml").write_text("model: {layers: 2}\n")
    assert splits_of(tmp_path, "e2e") is None


@pytest.mark.parametrize("value", ["1", "true", "null", "it's", "'x'", "x #2", "a: b", "", " x", 1,
                                   1e-5, True, None, [1, "a b"], {"a": "1"}, "é", "[x]", "- a"])
def test_a_written_value_is_read_as_it_was(value):
    assert read_value(write_value(value)) == value
