"""pretrain.py with phases, as users start it: killed on both sides of the border it is the straight run."""

import signal
import subprocess

import pytest
import yaml
from test_pretrain import finish, kill_tree, records, wait_for

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


@pytest.mark.slow
def test_killed_on_both_sides_of_the_border_equals_straight(start, workplace, phased):
    out = finish(start("output=phases_straight", recipe=phased))
    assert out.count("phase 2 of 2") == 2 and "densified step_00000012" in out
    run = workplace / "phases_killed"
    for step in (11, 13, 17):  # before the border, after it but before the first checkpoint there, and after that
        process = start("output=phases_killed", recipe=phased)
        wait_for(run, step, process)
        kill_tree(process)
    process = start("output=phases_killed", recipe=phased)
    wait_for(run, 21, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert "resumed from" in finish(start("output=phases_killed", recipe=phased))
    assert records(run) == records(workplace / "phases_straight")
    assert "resumed from step_00000024" in finish(start("output=phases_killed", recipe=phased))
    assert records(run) == records(workplace / "phases_straight")
    changed = start("output=phases_killed", "phases=[{share: 0.5, sparsity: 0.5}, {share: 0.5, sparsity: 0}]",
                    recipe=phased)
    assert changed.wait(timeout=120) == 2 and "phases is " in changed.communicate()[1]


@pytest.mark.slow
def test_tools_take_a_checkpoint_of_either_phase_as_what_it_is(start, workplace, phased):
    finish(start("output=phases_tools", "checkpoint.keep=9", recipe=phased))
    tools = workplace / "phases_tools" / "checkpoints"
    from test_pretrain import ROOT

    def tool(name: str, *words: str) -> str:
        import sys
        done = subprocess.run([sys.executable, "-W", "ignore", str(ROOT / "tools" / name), *words], cwd=workplace,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "75.0000% of the weights" in tool("inspect_checkpoint.py", str(tools / "step_00000012"), "--verify")
    assert "dense, every weight" in tool("inspect_checkpoint.py", str(tools / "step_00000016"), "--verify")
