"""pretrain.py with stages, as users start it: killed on both sides of the border it is the straight
run."""

import os

import pytest
import yaml
from test_pretrain import ROOT, finish, kill_tree, records, wait_for
from warm_commands import run_warm

pytestmark = pytest.mark.slow  # starts commands

STAGES = [{"share": 0.5, "sparsity": 0.75, "lr": 2e-3},
          {"share": 0.5, "sparsity": 0, "warmup_tokens": 700}]


@pytest.fixture(scope="module")
def staged(workplace):
    """The name of a recipe with stages of 12 steps each."""
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    recipe.pop("sparsity")
    (workplace / "stages.yaml").write_text(yaml.safe_dump(recipe | {"stages": STAGES}))
    return "stages.yaml"


def test_a_dry_run_prints_every_stage(ask, staged):
    out, _ = ask("--dry-run", recipe=staged).communicate()
    for said in ("stage 1 of 2: steps 1 to 12, 3,072 tokens",
                 "learning rate up to 0.002 over 512 tokens",
                 "stage 2 of 2: steps 13 to 24, 3,072 tokens",
                 "learning rate up to 0.001 over 700 tokens",
                 "densified, with fresh optimizer moments", "75.0000%", "sparsity plan: dense"):
        assert said in out
    assert out.count("layout: 1 rank =") == 2


def test_stages_that_do_not_fit_are_refused(ask, staged):
    ended = ask("sparsity=0.5", recipe=staged)
    assert ended.returncode == 2 and "sparsity and stages both" in ended.communicate()[1]


@pytest.fixture(scope="module")
def straight(start, workplace, staged):
    """An undisturbed run, all of whose checkpoints are kept, and what it said."""
    out = finish(start("output=stages_straight", "checkpoint.keep=9", recipe=staged))
    return workplace / "stages_straight", out


@pytest.mark.slow
def test_a_run_says_where_its_border_is(straight):
    run, out = straight
    assert out.count("stage 2 of 2") == 2 and "densified step_00000012" in out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{n:08}"
                                                                       for n in (8, 12, 16, 24)]


@pytest.mark.slow
def test_killed_on_both_sides_of_the_border_equals_straight(straight, start, workplace, staged):
    run = workplace / "stages_killed"
    for step in (11, 13):  # before the border, and after it but before the first checkpoint there
        process = start("output=stages_killed", recipe=staged)
        wait_for(run, step, process)
        kill_tree(process)
    finish(start("output=stages_killed", recipe=staged))
    assert records(run) == records(straight[0])
    changed = start("output=stages_killed",
                    "stages=[{share: 0.5, sparsity: 0.5}, {share: 0.5, sparsity: 0}]",
                    recipe=staged)
    assert changed.wait(timeout=300) == 2 and "stages is " in changed.communicate()[1]


@pytest.mark.slow
def test_tools_take_a_checkpoint_of_either_stage_as_what_it_is(straight, start, workplace, staged):
    def tool(name: str, *words: str) -> str:
        done = run_warm([ROOT / "tools" / name, *words], workplace, dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sparse, dense = (str(straight[0] / "checkpoints" / f"step_000000{step}") for step in (12, 16))
    assert "sparsity: 75.0000% of the weights" in tool("inspect_checkpoint.py", sparse, "--verify")
    assert "dense, every weight is active" in tool("inspect_checkpoint.py", dense, "--verify")
    tool("convert_checkpoint.py", "densify", sparse, "stages_dense")
    assert yaml.safe_load((workplace / "stages_dense/recipe.yaml").read_text())["stages"] == []
    tool("convert_checkpoint.py", "reshard", sparse, "stages_resharded", "parallel.tensor=2")
    out = finish(start("output=stages_resharded", "parallel.tensor=2", ranks=2, recipe=staged))
    assert "densified step_00000012" in out
    there, here = ([r["loss"] for r in records(run) if r["kind"] == "train" and r["step"] > 12]
                   for run in (straight[0], workplace / "stages_resharded"))
    assert here == pytest.approx(there, rel=1e-5)
