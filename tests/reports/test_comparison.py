"""Runs that differ in their seeds alone, and what a pair of them comes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_spdf.reports.comparison import (
    DIFFERENCE,
    FIGURES,
    Figure,
    _data,
    against,
    different_keys,
    figures_of,
    recipe_of,
)
from megatron_spdf.reports.pens import pen
from megatron_spdf.reports.runs import Logged
from megatron_spdf.reports.seeds import SameRecipe, flat, same_recipe

LOSS = FIGURES[0]


def logged(name: str, seed: int | None = 1, loss: float = 3.0, step: int = 10, **fields) -> Logged:
    values = {"seed": seed, "sparsity": {"seed": seed, "level": 0.5}, "output": name}
    train = [{"kind": "train", "step": step, "tokens": 100, "loss": loss, "flops": 6.0,
              "sparsity": 0.5, "tokens_per_second": 5.0, "step_seconds": 1.0}]
    return Logged(**{"directory": Path("/runs") / name, "label": name, "values": values,
                     "train": train, "valid": [{"step": step, "loss": loss}], "bytes": {},
                     "scores": {}, "notes": [], **fields})


def names(runs: list[Logged]) -> list[list[str]]:
    return [[run.label for run in group.runs] for group in same_recipe(runs)]


def test_runs_that_differ_in_seeds_and_places_alone_are_together():
    other = {"seed": 3, "sparsity": {"seed": 3, "level": 0.75}}
    runs = [logged("a/seed=1", 1), logged("c", 3, values=other), logged("a/seed=2", 2),
            logged("a/seed=3", 3, step=9), logged("again", 1)]
    assert names(runs) == [["a/seed=1", "a/seed=2"], ["c"], ["a/seed=3"], ["again"]]
    assert names([logged("a", 1, valid=[]), logged("b", 2, valid=[], step=9)]) == [["a"], ["b"]]


def test_fine_tuning_of_other_seeds_is_together_where_its_starts_are():
    def tuned(name: str, start: str, seed: int) -> Logged:
        return logged(name, values={"seed": seed, "checkpoint": f"/runs/{start}/checkpoints/x"})

    starts = [logged("a1", 1), logged("a2", 2)]
    found = [tuned("t1", "a1", 1), tuned("t2", "a2", 2)]
    assert names([*found, *starts]) == [["t1", "t2"], ["a1", "a2"]]
    assert names(found) == [["t1"], ["t2"]]  # nothing is known of their starts


@pytest.mark.parametrize(("labels", "said"), [
    (["a/seed=1", "a/seed=2"], "a, 2 seeds"), (["a/seed=1", "a/seed=10"], "a, 2 seeds"),
    (["dense_s1", "dense_s2"], "dense, 2 seeds"), (["lr=0.1/seed=1", "lr=0.1/seed=2"],
                                                   "lr=0.1, 2 seeds"),
    (["seed=1", "seed=2"], "runs, 2 seeds"), (["only"], "only")])
def test_seeds_have_a_name_together(labels, said):
    assert SameRecipe(tuple(logged(label) for label in labels)).label == said


def test_a_recipe_is_flat():
    assert flat({"a": {"b": 1, "c": {}, "d": None}, "e": "x", "f": [1, {"g": 2}], "h": True}) == {
        "a.b": "1", "a.d": "null", "e": "x", "f": '[1, {"g": 2}]', "h": "true"}


def test_differences_are_of_the_same_seeds():
    a = [logged("a", 1, 3.0), logged("a", 2, 3.5), logged("a", 3, 9.0)]
    b = [logged("b", 1, 3.2), logged("b", 2, 3.8)]
    # 0.2 and 0.3: mean 0.25, standard error 0.05, t of one degree of freedom 12.7062
    assert against(LOSS, a, b) == "+0.2500 ± 0.6353"
    assert against(LOSS, b, a[:1]) == "-0.2000"
    assert against(LOSS, a[:2], [logged("c", 7, 3.0), logged("c", 8, 3.1)]) == "-0.2000"
    assert LOSS.cell(b) == "3.5000 ± 3.8119" and LOSS.cell(b[:1]) == "3.2000"


def test_costs_are_ratios_and_what_is_not_there_is_a_dash():
    flops = next(row for row in FIGURES if row.title == "training FLOPs")
    steps = next(row for row in FIGURES if row.title == "steps")
    a, b = logged("a"), logged("b", step=5)
    assert against(flops, [a], [b]) == "1.00x" and against(steps, [a], [b]) == "0.50x"
    zero = Figure("z", lambda run: 0.0, ".1f")
    assert against(zero, [a], [b]) == "" and zero.cell([a]) == "0.0"
    missing = Figure("m", lambda run: None, ".1f", DIFFERENCE)
    assert missing.cell([a]) == "-" and against(missing, [a], [b]) == ""
    lost = logged("c", loss=float("nan"))
    assert LOSS.cell([lost]) == "-" and against(LOSS, [a], [lost]) == ""


def test_figures_that_no_run_has_are_left_out_and_scores_come_last():
    found = [row.title for row in figures_of([logged("a"), logged("b", scores={"BLEU": 0.5})])]
    assert found == ["validation loss", "training loss, mean of the last tenth",
                     "sparsity, measured (%)", "steps", "tokens", "training FLOPs",
                     "tokens/s, median", "BLEU"]


def test_keys_that_differ_leave_out_what_differs_within():
    a = SameRecipe((logged("a", values={"lr": 1, "x": 1, "seed": 1, "warm": 5}),
                    logged("b", values={"lr": 1, "x": 2, "seed": 2, "warm": 5})))
    b = SameRecipe((logged("c", values={"lr": 2, "warm": 5, "new": [1], "seed": 9}),))
    assert recipe_of(a) == {"lr": "1", "warm": "5"}
    assert different_keys(a, b) == [("lr", "1", "2"), ("new", "-", "[1]")]
    assert different_keys(a, a) == []


def test_the_script_has_students_t_for_as_many_runs_and_the_figures_of_every_choice():
    """Quantiles of 97.5% as tables print them, for one degree of freedom less than runs."""
    a = [logged(f"a/seed={seed}", seed, 3.0 + seed) for seed in (1, 2, 3)]
    b = logged("b", 9, 2.0, values={"seed": 9, "lr": 2})
    runs, choices = [*a, b], [SameRecipe(tuple(a)), *(SameRecipe((run,)) for run in (*a, b))]
    found = _data(choices, figures_of(runs), {run.directory: pen(i) for i, run in enumerate(runs)},
                  len(runs))
    assert found["student"] == pytest.approx([0.0, 0.0, 12.7062, 4.3027, 3.1824], abs=1e-4)
    rows = figures_of(runs)
    assert [found[key] for key in ("titles", "against", "digits")] == [
        [row.title for row in rows], [row.against for row in rows], [int(row.form[-2])
                                                                     for row in rows]]
    assert found["against"][0] == DIFFERENCE and found["digits"][:2] == [4, 4]
    for made, choice in zip(found["choices"], choices, strict=True):
        assert made["label"] == choice.label
        assert made["cells"] == [row.cell(choice.runs) for row in rows]
        assert made["values"][0] == [(str(run.seed), run.validation_loss) for run in choice.runs]
    assert [made["color"] for made in found["choices"]] == [0, 0, 1, 2, 3]
    assert found["choices"][-1]["keys"] == {"lr": "2"} and found["same"] == 0
