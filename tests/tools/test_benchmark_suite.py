"""tools/benchmark.py --suite: what it measures and that nothing can stop it, not how fast anything
is."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import moves, sizes, suite, suite_parts
from benchmarks.breakdown import Clock
from benchmarks.max_depth import deepest, planned_bytes, with_layers
from warm_commands import run_warm

from megatron_spdf.planning.search import USABLE
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.algorithms.base import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PATTERNS = ["unstructured 75%, kept for the step", "unstructured 75%, layer by layer",
            "tiles of 16, 75%",
            "tiles of 32, 75%", "2:4"]


def child(script: str) -> list[str]:
    """A part of the suite that runs a shell script; `row N` writes a row."""
    return [
        "sh",
        "-c",
        """row() { echo '{"table": "t", "row": {"n": '$1'}}' >> "$file"; }; file=$1; """ + script,
        "sh",
    ]


def test_a_part_that_finishes_gives_its_rows():
    outcome = suite.run_part("p", child('row 1; row 2; test "$2" = 30'), 30)
    assert (outcome.state, outcome.tables) == ("finished", {"t": [{"n": 1}, {"n": 2}]})


def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_rows(tmp_path):
    alive = tmp_path / "alive"
    outcome = suite.run_part("p",
                             child(f"row 1; (while :; do date +%N > {alive}; sleep 0.05; done) & "
                                   "sleep 600"), 4)
    assert (outcome.state, outcome.tables) == ("out of time after 4 s", {"t": [{"n": 1}]})
    assert outcome.seconds < 60
    last = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == last


def test_a_part_that_fails_says_why_and_keeps_its_rows():
    outcome = suite.run_part(
        "p", child("""row 1; printf '{"table' >> "$file"; echo x; echo no more >&2; exit 3"""), 30
    )
    assert (outcome.state, outcome.tables) == ("failed (3): no more", {"t": [{"n": 1}]})
    assert suite.run_part("p", child("kill -9 $$"), 30).state == "failed (-9): it said nothing"


def test_parts_together_take_less_than_nine_minutes():
    assert sum(suite.PARTS.values()) == 530 < 9 * 60
    assert suite.PARTS.keys() == suite_parts.PARTS.keys()


def test_rows_are_printed_and_kept_as_they_come(capsys):
    """So that whatever ends the suite, what was measured is there."""
    seen = []
    script = """row 1; sleep 1.2; row 2; sleep 1.2; row 3"""
    outcome = suite.run_part("p", child(script), 30,
                             lambda so_far: seen.append((so_far.state, so_far.tables)))
    assert [state for state, _ in seen] == ["running"] * len(seen) and len(seen) >= 2
    assert seen[0][1] == {"t": [{"n": 1}]} and seen[-1][1] == outcome.tables
    assert outcome.tables == {"t": [{"n": 1}, {"n": 2}, {"n": 3}]}
    assert capsys.readouterr().out.splitlines() == ["p: t: n 1", "p: t: n 2", "p: t: n 3"]


def test_a_suite_that_is_ended_ends_its_part_and_has_written_what_there_is(tmp_path):
    """Its part writes a row, and then that it is alive until it is ended."""
    script = (
        "import sys; sys.path[:0] = ['tools']; from pathlib import Path; from benchmarks import "
        "suite; suite.PARTS['p'] = 60; real = suite.run_part; suite.run_part = lambda part, "
        "command, *rest: real(part, ['sh', '-c', sys.argv[2], 'sh'], *rest); "
        "suite.run('cpu', ['p'], Path(sys.argv[1]))")
    alive = tmp_path / "alive"
    part = f"""echo '{{"table": "t", "row": {{"n": 1}}}}' >> "$1"
               while :; do date +%N > {alive}; sleep 0.05; done"""
    ran = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), part], cwd=ROOT,
                           env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    written = tmp_path / "suite.json"
    until = time.monotonic() + 60
    while not written.exists() and time.monotonic() < until:
        time.sleep(0.05)
    ran.terminate()
    assert ran.wait(100) == 128 + signal.SIGTERM
    (kept,) = json.loads(written.read_text())["parts"]
    assert (kept["state"], kept["tables"]) == ("running", {"t": [{"n": 1}]})
    last = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == last


def test_what_a_part_leaves_over_is_the_next_parts_and_failing_ones_do_not_stop_it(
    tmp_path, monkeypatch, capsys
):
    budgets = []

    def run_part(part, command, budget, keep):
        budgets.append((part, budget))
        return suite.Outcome(part, "failed (1): no", 10.0,
                             {"t": [{"x": 1.0, "at": "now"}]} if part == "peers" else {})

    monkeypatch.setattr(suite, "run_part", run_part)
    assert suite.run("cpu", ["kernels", "training", "peers"], tmp_path / "new") == 0
    seconds = suite.PARTS
    assert budgets == [("kernels", seconds["kernels"]),
                       ("training", seconds["training"] + seconds["kernels"] - 10),
                       ("peers", seconds["peers"] + seconds["training"] + seconds["kernels"] - 20)]
    assert suite.run("cpu", ["kernels"], tmp_path / "new") == 1
    assert "no GPU here" in capsys.readouterr().out


def test_a_table_has_the_columns_of_all_rows():
    rows = [{"what": "a", "step (s)": 0.123456, "at": "now"}, {"what": "b", "note": "no"},
            {"what": "c", "n": 12345}]
    lines = suite.render_part({"part": "p", "state": "finished", "seconds": 1.0,
                               "tables": {"t": rows}})
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in "\n".join(lines).splitlines() if line.startswith("| ")]
    assert cells == [["what", "step (s)", "note", "n"], ["a", "0.1235", "-", "-"],
                     ["b", "-", "no", "-"], ["c", "-", "-", "12,345"]]


def test_a_clock_books_every_moment_on_the_innermost_part():
    moments = iter(range(100))
    clock = Clock(lambda: None, lambda: float(next(moments)))
    inner = clock.timed("expand", lambda: None)
    outer = clock.timed("forward", lambda: (inner(), inner()))

    def fails():
        raise ValueError

    clock.timed("rest", lambda: (outer(),
                                 pytest.raises(ValueError, clock.timed("optimizer", fails))))()
    # Rest opens at 0, forward 1, expand 2 to 3 and 4 to 5, forward ends at 6, optimizer 7 to 8,
    # rest ends at 9.
    assert clock.seconds == {"rest": 3.0, "forward": 3.0, "expand": 2.0, "optimizer": 1.0}
    assert sum(clock.seconds.values()) == 9.0


def test_the_gpu_trains_gpt3_xl_with_every_pattern():
    models = []
    for pattern in [sizes.DENSE, *sizes.GPU.patterns.values()]:
        recipe = sizes.GPU.recipe(pattern)
        models.append(recipe.model)
        assert (recipe.model.preset, recipe.train.sequence_length,
                recipe.train.precision) == ("gpt3_xl", 2048, "bf16")
        assert recipe.parallel.world == 1
    assert all(model == models[0] for model in models)
    sparsity = [sizes.GPU.recipe(p).sparsity for p in sizes.GPU.patterns.values()]
    assert [(s.pattern, s.level, s.dense_copy) for s in sparsity] == [
        ("unstructured", 0.75, "per_step"), ("unstructured", 0.75, "per_layer"),
        ("tile", 0.75, "per_step"), ("tile", 0.75, "per_step"), ("2:4", 0.5, "per_step")]
    assert [s.tile for s in sparsity if s.pattern == "tile"] == [64, 128]


def test_the_gpu_trains_other_families_and_moves_masks_by_every_algorithm(monkeypatch):
    # other tests may have brought theirs
    ours = {name: ALGORITHMS.get(name) for name in ALGORITHMS.names()
            if ALGORITHMS.get(name).__module__.startswith("megatron_spdf.")}
    monkeypatch.setattr(ALGORITHMS, "_tenants", ours)
    for scale in (sizes.GPU, sizes.CPU):
        families = [scale.family(model, pattern) for model in scale.families.values()
                    for pattern in (sizes.DENSE, *scale.few.values())]
        assert [r.model.architecture for r in families] == ["llama"] * 3 + ["qwen3"] * 3
        assert {r.parallel.world for r in families} == {1}
        moving = scale.moving()
        assert [r.sparsity.algorithm for r in moving.values()] == [
            "rigl", "set", "gmp", "ste", "top_kast", "acdc"]
        assert all(next(moves._due_steps(stages_of(r)[-1]), None) or len(stages_of(r)) > 2
                   for r in moving.values() if r.steps < 10**5)
    assert {r.train.sequence_length for r in families[:1]} == {32}
    assert [(r.model.preset, r.steps) for r in sizes.GPU.moving().values()] == (
        [("gpt3_xl", 24_796)] * 2 + [("gpt2_small", 4_768)] * 4)
    assert {sizes.GPU.family(model, sizes.DENSE).train.sequence_length
            for model in sizes.GPU.families.values()} == {2048}
    small = sizes.GPU.small_recipe(sizes.DENSE)
    assert small.model.preset == "gpt2_small" and small.train.precision == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [sizes.DENSE, "{level: 0.75, dense_copy: per_layer}"])
def test_the_planners_deepest_model_fits_and_one_layer_more_does_not(sparsity):
    assert sizes.GPU.deep_recipe(sparsity).model.hidden == 4096
    recipe, memory = sizes.CPU.deep_recipe(sparsity), 2**24
    layers = deepest(recipe, memory)
    one_more = planned_bytes(with_layers(recipe, layers + 1))
    assert layers > 3 and planned_bytes(with_layers(recipe, layers)) <= USABLE * memory < one_more
    assert deepest(recipe, 2**18) == 0


def benchmark(*words: str) -> subprocess.CompletedProcess:
    return run_warm([ROOT / "tools/benchmark.py", *words], ROOT, ENVIRONMENT)


@pytest.mark.slow
def test_the_whole_suite_runs_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, "tools/benchmark.py", "--suite", "h200", "--output",
                           str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    report, text = json.loads((tmp_path / "suite.json").read_text()), (tmp_path
                                                                       / "suite.md").read_text()
    assert (
        report["scale"] == "cpu"
        and "say nothing about a GPU" in text
        and "say nothing about a GPU" in done.stdout
    )
    assert (
        report["date"]
        and report["device"]
        and report["versions"]["torch"]
        and "--suite h200" in report["command"]
    )
    parts = {outcome["part"]: outcome for outcome in report["parts"]}
    assert {name: outcome["state"] for name,
            outcome in parts.items()} == dict.fromkeys(suite.PARTS, "finished")

    trained = parts["training"]["tables"]["training"]
    assert [row["what"] for row in trained] == ["dense", *PATTERNS, "dense, again"]
    assert [row["sparsity (%)"] for row in trained] == pytest.approx([0, 75, 75, 75, 75, 50, 0])
    assert all(row["step (s)"] > 0 and row["tokens/s"] > 0 and row["TFLOP/s"] > 0 and row["at"]
               for row in trained)
    by_part = {row["what"]: row for row in parts["training"]["tables"]["a step by part (ms)"]}
    assert list(by_part) == [row["what"] for row in trained]
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in by_part.values())
    assert (by_part["dense"]["expand"], by_part["dense"]["compress"]) == (0, 0)
    assert by_part["2:4"]["expand"] > 0 and by_part["2:4"]["compress"] > 0

    kernels = parts["kernels"]["tables"]["kernels"]
    kinds = {row["kernel"].split(",")[0] for row in kernels if "kernel" in row}
    assert kinds == {"expand", "compress", "tiles", "2:4"}
    assert any(row["what"] == "stanford-stk" for row in kernels)
    by = {row["what"]: row["by"] for row in parts["kernels"]["tables"]["what computes"]}
    assert by["2:4"] == by["tiles of 16"] == "expanded and multiplied as dense weights"
    assert all(row["planned state (GiB)"] == pytest.approx(row["state (GiB)"], rel=1e-3)
               and row["planned peak (GiB)"] > row["state (GiB)"] and row["planned step (s)"] > 0
               for row in [*trained, *parts["families"]["tables"]["families"]])
    predicted = parts["training"]["tables"]["planner"]
    assert [row["what"] for row in predicted] == [row["what"] for row in trained]
    assert predicted[0]["predicted / measured"] == pytest.approx(1.0, rel=1e-4)
    names = [row["what"] for row in parts["families"]["tables"]["families"]]
    assert len(names) == 6 and [n.split(",")[0] for n in names] == ["Llama"] * 3 + ["Qwen3"] * 3
    moved = parts["moves"]["tables"]["moves"]
    assert [row["what"].split(",")[0] for row in moved] == [
        "rigl", "set", "gmp", "ste", "top_kast", "acdc"]
    assert all("note" not in row and row["step (s)"] > 0 for row in moved)
    ways = parts["host"]["tables"]["host"]
    assert len(ways) == 9 and all(row["tokens/s"] > 0 for row in ways[:3])
    assert all("cuda_graph=true needs a GPU" in row["note"] for row in ways[3:6])
    assert all("would need a GPU" in row["note"] for row in ways[6:])
    peers = parts["peers"]["tables"]["peers"]
    assert len(peers) == 2 and all(row["tokens/s"] > 0 for row in peers)
    depths = {row["what"]: row for row in parts["largest"]["tables"]["largest"] if row["note"]
              == "trained"}
    assert depths["unstructured 75%, layer by layer"]["layers"] > depths["dense"]["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
@pytest.mark.parametrize("what", ["step", "train"])
def test_dense_and_sparse_are_measured_in_turn_on_the_recipes_engine(what, engine, tmp_path):
    out = tmp_path / "figures.json"
    tiny = ["model.hidden=64", "model.heads=4", "model.layers=1", "model.vocab_size=256",
            "train.global_batch=4", f"engine={engine}", "parallel.zero_stage=1"]
    done = benchmark(what, *tiny, "--steps", "4", "--output", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {name: run["sparsity"] for name,
            run in report["runs"].items()} == {"dense": 0.0, "sparse": 0.75}
    assert (
        report["recipe"]["model"]["hidden"] == 64
        and f"tools/benchmark.py {what}" in report["command"]
    )
    for name, run in report["runs"].items():
        assert run["tokens_per_second"] > 0 and run["engine"] == engine
        assert ("DeepSpeed" in run["choices"]) == (engine == "deepspeed")
        assert f"{name}: engine {engine}; {run['choices']}" in done.stdout
    if what == "step":
        assert "step time, sparse over dense" in done.stdout
        assert "| by part " in done.stdout and "sparse (ms) |" in done.stdout
        sparse = report["runs"]["sparse"]["parts"]
        assert (
            sparse["expand"] > 0
            and sparse["compress"] > 0
            and report["runs"]["dense"]["parts"]["expand"] == 0
        )
    else:
        assert (
            "tokens a second, sparse over dense" in done.stdout
            and "peak memory (GiB)" in done.stdout
        )


@pytest.mark.slow
def test_moves_are_measured_beside_steps_without(tmp_path):
    out = tmp_path / "figures.json"
    tiny = ["model.hidden=64", "model.heads=4", "model.layers=1", "model.vocab_size=256",
            "train.global_batch=4"]
    done = benchmark("moves", *tiny, "--steps", "3", "--output", str(out))
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["set", "rigl", "gmp"]
    for run in runs.values():
        assert run["move_seconds"] > 0
        assert run["share"] == pytest.approx(run["longer_seconds"] / run["step_seconds"] / 100)
    assert runs["gmp"]["sparsity"] < runs["set"]["sparsity"] == 0.75


@pytest.mark.parametrize(("words", "said"), [
    (["step", "nowhere.yaml"], "there is no recipe"),
    (["train", "a.yaml", "b.yaml"], "are 2 recipes; name one"),
    (["step", "--steps", "1"], "take 2 or more"),
    (["step", str(ROOT / "configs/finetune/e2e.yaml")], "is a fine-tuning recipe, whose model is"),
    (["step", "parallel.tensor=2"], "needs 2 processes")])
def test_bad_input_is_refused(words, said, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    assert importlib.import_module("benchmark").main() == 2
    assert said in capsys.readouterr().err


def test_a_teacher_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 8192,
        "n_positions": 256, "activation_function": "gelu_new"}))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "train", f"distill.teacher={tmp_path}"])
    assert importlib.import_module("benchmark").main() == 2
    assert "and a benchmark loads no teacher; add distill.weight=0" in capsys.readouterr().err
