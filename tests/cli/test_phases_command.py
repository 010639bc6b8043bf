"""pretrain.py with phases, as users start it: killed on both sides of the border it is the straight run."""

import subprocess
import sys

import pytest
import yaml
from test_pretrain import ROOT, finish, kill_tree, records, wait_for

PHASES = [{"share": 0.5, "sparsity": 0.75, "lr": 2e-3}, {"share": 0.5, "sparsity": 0, "warmup_tokens": 700}]


@pytest.fixture(scope="module")
def phased(workplace):
    """The name of a recipe with phases of 12 steps each."""
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    recipe.pop("sparsity")
    (workplace / "phases.yaml").write_text(yaml.safe_dump(recipe | {"phases": PHASES}))
    return "phases.yaml"


def test_a_dry_run_prints_every_phase(ask, phased):
    out, _ = ask("--dry-run", recipe=phased).communicate()
    for said in ("phase 1 of 2: steps 1 to 12, 3,072 tokens", "learning rate up to 0.002 over 512 tokens",
                 "phase 2 of 2: steps 13 to 24, 3,072 tokens", "learning rate up to 0.001 over 700 tokens",
                 "densified, with fresh optimizer moments", "75.0000%", "sparsity plan: dense"):
        assert said in out
    assert out.count("layout: 1 ranks") == 2


def test_phases_that_do_not_fit_are_refused(ask, phased):
    ended = ask("sparsity=0.5", recipe=phased)
    assert ended.returncode == 2 and "sparsity and phases both" in ended.communicate()[1]


@pytest.fixture(scope="module")
def straight(start, workplace, phased):
    """An undisturbed run, all of whose checkpoints are kept, and what it said."""
    out = finish(start("output=phases_straight", "checkpoint.keep=9", recipe=phased))
    return workplace / "phases_straight", out


@pytest.mark.slow
def test_a_run_says_where_its_border_is(straight):
    run, out = straight
    assert out.count("phase 2 of 2") == 2 and "densified step_00000012" in out
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step_{n:08}" for n in (8, 12, 16, 24)]


@pytest.mark.slow
def test_killed_on_both_sides_of_the_border_equals_straight(straight, start, workplace, phased):
    run = workplace / "phases_killed"
    for step in (11, 13):  # before the border, and after it but before the first checkpoint there
        process = start("output=phases_killed", recipe=phased)
        wait_for(run, step, process)
        kill_tree(process)
    finish(start("output=phases_killed", recipe=phased))
    assert records(run) == records(straight[0])
    changed = start("output=phases_killed", "phases=[{share: 0.5, sparsity: 0.5}, {share: 0.5, sparsity: 0}]",
                    recipe=phased)
    assert changed.wait(timeout=120) == 2 and "phases is " in changed.communicate()[1]


@pytest.mark.slow
def test_tools_take_a_checkpoint_of_either_phase_as_what_it_is(straight, start, workplace, phased):
    def tool(name: str, *words: str) -> str:
        done = subprocess.run([sys.executable, "-W", "ignore", str(ROOT / "tools" / name), *words], cwd=workplace,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sparse, dense = (str(straight[0] / "checkpoints" / f"step_000000{step}") for step in (12, 16))
    assert "sparsity: 75.0000% of the weights" in tool("inspect_checkpoint.py", sparse, "--verify")
    assert "dense, every weight is active" in tool("inspect_checkpoint.py", dense, "--verify")
    tool("convert_checkpoint.py", "densify", sparse, "phases_dense")
    assert yaml.safe_load((workplace / "phases_dense/recipe.yaml").read_text())["phases"] == []
    tool("convert_checkpoint.py", "reshard", sparse, "phases_resharded", "parallel.tensor=2")
    out = finish(start("output=phases_resharded", "parallel.tensor=2", ranks=2, recipe=phased))
    assert "densified step_00000012" in out
    there, here = ([r["loss"] for r in records(run) if r["kind"] == "train" and r["step"] > 12]
                   for run in (straight[0], workplace / "phases_resharded"))
    assert here == pytest.approx(there, rel=1e-5)
