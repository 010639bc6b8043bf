"""Invariants 2 and 6 while masks move: a run that is killed in the middle of a move equals a
straight one, also at another layout."""

import json
import os
import signal
from pathlib import Path

import pytest
from test_pretrain import records
from warm_commands import run_warm

pytestmark = pytest.mark.slow

RULES = {"rigl": "{level: 0.75, algorithm: rigl, update: {every: 3, stop: 1.0, newborn: ages}}",
         "gmp": "{level: 0.75, algorithm: gmp, update: {every: 2, stores: 1, start: 0.1}}"}


@pytest.fixture
def recipe(workplace):
    def make(rule: str) -> str:
        (workplace / f"{rule}.yaml").write_text(
            f"extends: recipe.yaml\nsparsity: {RULES[rule]}\ncheckpoint: {{every: 2}}\n"
            "log: {tensorboard: false, every: 1}\nparallel: {timeout: 30}\n"
            "fault_tolerance: {join_seconds: 20, hang_seconds: 20}\ntrain: {tokens: 5120}\n")
        return f"{rule}.yaml"
    return make


@pytest.fixture
def straight(workplace, start, recipe):
    """A run that nothing interrupts."""
    def make(rule: str) -> Path:
        made, output = recipe(rule), workplace / f"straight-{rule}"
        if not output.exists():
            out, err = start(f"output={output.name}", recipe=made, ranks=1).communicate(timeout=300)
            assert list((output / "checkpoints").glob("*20")), out + err
        return output
    return make


@pytest.mark.parametrize(("words", "said"), [
    (["sparsity.update.every=4"], ["sparsity.update.every is 3 there and 4 here"]),
    (["sparsity.update.newborn=plain"], ["sparsity.update.newborn is ages there and plain here"]),
    (["sparsity.update.gradient=micro_batch"],
     ["sparsity.update.gradient is step there and micro_batch here"]),
    (["sparsity.algorithm=set"], ["sparsity.algorithm is rigl there and set here"])], ids=str)
def test_a_run_goes_on_with_no_other_rule(straight, ask, words, said):
    output = straight("rigl")
    before = sorted(output.rglob("*"))
    refused = ask(f"output={output.name}", *words, recipe="rigl.yaml")
    assert refused.returncode == 2 and sorted(output.rglob("*")) == before
    message = refused.communicate()[1]
    assert all(part in message for part in [*said, "another output"]), message


@pytest.mark.parametrize(("rule", "place", "ranks", "layout"), [
    ("rigl", "carrying", 1, "parallel.data=2"), ("rigl", "masking", 2, "parallel.pipeline=2"),
    ("gmp", "choosing", 1, "parallel.data=2")])
def test_killed_in_a_move_equals_straight(workplace, straight, rule, place, ranks, layout):
    """The move is made again, from the checkpoint before it."""
    whole, output = straight(rule), f"{rule}-{place}"
    script = Path(__file__).with_name("kill_in_move.py")
    done = run_warm([script, f"{rule}.yaml", output, place, "3", str(ranks), layout], workplace,
                    dict(os.environ), 300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first[-ranks:] == [-signal.SIGKILL] * ranks and 0 not in first, first
    assert second == [0, 0], (workplace / "killed.txt").read_text()[-3000:]
    there, here = losses(whole), losses(workplace / output)
    assert here == {step: pytest.approx(loss, abs=2e-5) for step, loss in there.items()}
    moved = [[r[key] for key in ("step", "update", "moved")]
             for run in (whole, workplace / output) for r in records(run) if r["kind"] == "mask"]
    assert moved[: len(moved) // 2] == moved[len(moved) // 2 :] and len(moved) > 6


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(run) if r["kind"] == "train"}
