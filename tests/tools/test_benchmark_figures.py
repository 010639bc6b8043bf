"""Figures of tools/benchmark.py by hand, with a clock and kernels of our own: what is divided by
what, over which steps, and what is drawn up."""

from __future__ import annotations

import re
import statistics
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import (
    baselines,
    breakdown,
    data_throughput,
    engines,
    environment,
    kernel_throughput,
    max_depth,
    moves,
    save,
    sizes,
    step,
    suite,
    suite_parts,
    tiles,
    train,
)
from benchmarks.data_throughput import OURS, THEIRS, Timing
from benchmarks.part import Part

from megatron_spdf.architecture.base import Weight
from megatron_spdf.planning.hardware import GPUS
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.plan import Plan

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    now = [100.0]
    for module in (step, train, save, moves, baselines, max_depth,
                   sys.modules[Part.__module__]):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return now


class Engine:
    """An engine whose steps take so many seconds each, in turn."""

    def __init__(self, clock, seconds, recipe):
        self.clock, self.seconds, self.numbers = clock, iter(seconds), []
        self.plan, self.device, self.choices, self.models = Plan.of(recipe), CPU, "by hand", []
        self.tokens = []

    def step(self, batch, number, tokens, stop):
        self.numbers.append(number)
        self.tokens.append(tokens)
        self.clock[0] += next(self.seconds)
        return number

    def state_bytes(self):
        return {"parameters": 2**20, "gradients": 3 * 2**20}


@pytest.mark.parametrize(("device", "peak"), [("NVIDIA H100 80GB HBM3", GPUS["h100"].bf16),
                                              ("CPU", None)])
def test_rates_follow_from_the_median(recipe, monkeypatch, device, peak):
    monkeypatch.setattr(step, "device_name", lambda: device)
    r = recipe(sparsity=0.75, parallel={"tensor": 2, "data": 2})
    found = step.rates(r, [1.0, 9.0, 2.0, 4.0, 3.0])
    assert found["step_seconds"] == 3.0 and found["tokens_per_second"] == 256 / 3
    assert found["quartiles"] == statistics.quantiles([1, 2, 3, 4, 9], n=4)[::2]
    flops = training_flops(r.model, 32).total * 256 / 3 / 4
    assert found["tflops_per_rank"] == pytest.approx(flops / 1e12)
    assert found["mfu"] == (peak and pytest.approx(flops / peak))
    skipped = step.rates(r, [3.0, 3.0], Plan.of(r))
    assert skipped["tflops_per_rank"] == pytest.approx(
        training_flops(r.model, 32, Plan.of(r)).total * 256 / 3 / 4 / 1e12)


def test_figures_of_an_engine_count_active_weights_where_zeros_are_skipped(recipe, clock):
    r = recipe(sparsity={"level": 0.75, "pattern": "tile", "tile": 16},
               model={"hidden": 128, "ffn_hidden": 512})
    engine = Engine(clock, [], r)
    plain = step.figures_of(r, engine, [1.0, 2.0])
    engine.device = torch.device("cuda")
    skipped = step.figures_of(r, engine, [1.0, 2.0])
    whole, part = (training_flops(r.model, 32, plan).total for plan in (None, r and
                                                                        engine.plan.skipped))
    assert part < whole and skipped["tflops_per_rank"] / plain["tflops_per_rank"] == pytest.approx(
        part / whole)
    assert plain["sparsity"] == 0.75 and plain["choices"] == "by hand"
    assert step.state_bytes(plain) == 4 * 2**20


def test_steps_are_timed_in_turn_after_two(recipe, clock, monkeypatch):
    dense, sparse = recipe(), recipe(sparsity=0.5)
    made = [Engine(clock, [50.0, 60.0, 1.0, 2.0, 3.0], dense),
            Engine(clock, [70.0, 80.0, 4.0, 5.0, 6.0], sparse)]
    built = iter(made)
    monkeypatch.setattr(step, "joined", engines_of := contextmanager(lambda recipe: iter([CPU])))
    monkeypatch.setattr(step, "build_engine", lambda recipe, device: next(built))
    asked = []
    monkeypatch.setattr(step, "measure_parts",
                        lambda recipe, engine, numbers: asked.append(numbers) or {"forward": 1.0})
    found = step.measure_steps({"dense": dense, "sparse": sparse}, 3)
    assert engines_of and [f["step_seconds"] for f in found.values()] == [2.0, 5.0]
    assert [e.numbers for e in made] == [[1, 2, 3, 4, 5]] * 2
    assert made[0].tokens == [256 * n for n in range(1, 6)]
    assert asked == [range(6, 9)] * 2
    lines = step.render_steps(found)
    assert lines[-1] == "step time, sparse over dense: 2.500"
    cells = [c.strip() for c in lines[0].splitlines()[-1].strip("|").split("|")]
    assert cells[:5] == ["sparse", "50.00%", "5.0000", "4.0000 - 6.0000", "51"]
    assert cells[-1] == "4.0"


def test_training_is_timed_by_stretches(recipe, clock, monkeypatch):
    r = recipe()
    engine = Engine(clock, [9.0, 9.0, *[1.0] * 3, *[3.0] * 3], r)
    held = iter([100, 350])
    monkeypatch.setattr(train, "build_engine", lambda recipe, device, quick: engine)
    monkeypatch.setattr(train, "allocated", lambda: next(held))
    monkeypatch.setattr(train, "peak_of", lambda run, before: run() or before + 1)
    run = train.start(r, CPU)
    assert (run.held, run.peak, engine.numbers) == (250, 251, [1, 2])
    run.advance(3)
    run.advance(3)
    assert run.seconds == [1.0, 3.0] and engine.numbers == list(range(1, 9)) and run.step == 8
    assert run.figures["step_seconds"] == 2.0 and run.figures["peak_bytes"] == 251
    text = train.render_training({"dense": run.figures,
                                  "sparse": {**run.figures, "tokens_per_second": 64.0}})
    assert text[-1] == "tokens a second, sparse over dense: 0.500"


def test_training_of_recipes_alternates(recipe, monkeypatch):
    order = []

    class Run:
        def __init__(self, recipe, device):
            self.name = recipe.seed

        def advance(self, steps):
            order.append((self.name, steps))

        figures = {}

    monkeypatch.setattr(train, "joined", contextmanager(lambda recipe: iter([CPU])))
    monkeypatch.setattr(train, "start", Run)
    for steps, each in ((10, 2), (3, 1)):
        order.clear()
        train.measure_training({"a": recipe(seed=1), "b": recipe(seed=2)}, steps)
        assert order == [(1, each), (2, each)] * 4


def test_parts_of_a_step_are_means_over_its_steps(recipe, monkeypatch):
    now = [0.0]

    class Inner:
        def update(self):
            now[0] += 4.0

    class Timed:
        timed = {"inner.update": "optimizer", "reduce": "communication"}

        def __init__(self):
            self.inner, self.numbers = Inner(), []

        def reduce(self):
            now[0] += 2.0
            return SimpleNamespace(wait=lambda: now.__setitem__(0, now[0] + 8.0))

        def step(self, batch, number, tokens, stop):
            self.numbers.append((number, tokens, len(batch)))
            now[0] += 1.0
            self.reduce()
            self.inner.update()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = breakdown.Clock
    monkeypatch.setattr(breakdown, "Clock", lambda synchronize: clock(synchronize, lambda: now[0]))
    engine = Timed()
    found = breakdown.measure_parts(recipe(), engine, range(3, 5))
    assert found == {"forward": 0.0, "backward": 0.0, "expand": 0.0, "compress": 0.0,
                     breakdown.OPTIMIZER: 4.0, "communication": 10.0, breakdown.REST: 1.0}
    assert engine.numbers == [(3, 768, 4), (4, 1024, 4)]
    engine.step([], 5, 0, False)  # no clocks any more
    (text,) = breakdown.render_parts({"dense": found})
    assert "| communication" in text and "10000" in text.replace(",", "").replace("1e+04", "10000")


def timing(wall, cpu=0.0, memory=0):
    return Timing(wall, cpu, memory)


def test_rates_of_a_tool_are_medians_less_the_start():
    pairs = [(timing(1, 2, 5), timing(5, 12, 7)), (timing(2, 1, 9), timing(12, 31, 6)),
             (timing(3, 3, 1), timing(8, 23, 4))]
    rate = data_throughput._rate("tool", 4, pairs, 60.0)
    assert (rate.start, rate.wall, rate.memory, rate.workers) == (2, 5, 7, 4)
    assert (rate.megabytes_per_second, rate.megabytes_per_cpu_second) == (12.0, 3.0)


def rate_of(tool, workers, per_second, per_cpu):
    return {"tool": tool, "workers": workers, "megabytes_per_second": per_second,
            "megabytes_per_cpu_second": per_cpu, "start": 1.0, "memory": 2**20}


def test_ratios_of_tools_and_workers():
    facts = {"text_bytes": 2_500_000, "documents": 1000, "tokens": 12345, "rounds": 3,
             "rates": [rate_of(OURS, 2, 10.0, 5.0), rate_of(OURS, 6, 28.0, 4.0),
                       rate_of(THEIRS, 2, 4.0, 1.0), rate_of(THEIRS, 6, 7.0, 2.0)],
             "samples_per_second": 1500.0, "different_documents": 0}
    lines = data_throughput.render(facts)
    assert lines[0].startswith("2.5 MB of text in 1,000 documents, 12,345 tokens; medians of 3")
    assert lines[4:] == [
        "6 workers over 2: 0.90 of the rate per added worker, 0.80 of the MB per CPU second",
        "over Megatron-LM's tool, 2 workers: 2.5 times the MB/s, 5.0 times the MB per CPU second",
        "over Megatron-LM's tool, 6 workers: 4.0 times the MB/s, 2.0 times the MB per CPU second",
        "one process reads 1,500 samples of 2,048 tokens a second for training, 3.1 million "
        "tokens/s", "documents whose tokens differ from Megatron-LM's: 0"]
    alone = {**facts, "rates": facts["rates"][:1], "different_documents": None}
    assert len(data_throughput.render(alone)) == 5


@pytest.mark.parametrize(("fits", "tries", "tried"), [
    (25, 9, [(20, True), (22, True), (24, True), (26, False)]),
    (16, 9, [(20, False), (18, False), (16, True)]), (25, 2, [(20, True), (22, True)]),
    (0, 3, [(20, False), (18, False), (16, False)])])
def test_depths_are_tried_by_tenths_until_the_border(recipe, monkeypatch, clock, fits, tries,
                                                     tried):
    monkeypatch.setattr(max_depth, "deepest", lambda recipe, memory: 20)
    monkeypatch.setattr(max_depth, "try_out", lambda recipe, device: (
        3 * 2**29 if recipe.model.layers <= fits else None))
    first, *rows = max_depth.search(recipe(sparsity=0.75), CPU, 2**30, tries, until=1e9)
    assert first["layers"] == 20 and first["note"] == "the planner's largest, in 92% of the memory"
    whole = recipe(model={"layers": 20}).model.weights()
    linear = 12 * 20 * 64**2
    assert first["weights (billions)"] == pytest.approx(sum(w.numel for w in whole) / 1e9)
    assert first["weights (billions)"] - first["active (billions)"] == pytest.approx(
        0.75 * linear / 1e9)
    assert [(r["layers"], r["note"] == "trained") for r in rows] == tried
    assert {r["peak memory (GiB)"] for r in rows} <= {1.5, None}


def test_no_depth_is_tried_that_would_not_end_in_time(recipe, monkeypatch, clock):
    def try_out(recipe, device):
        clock[0] += 10.0
        return 0

    monkeypatch.setattr(max_depth, "deepest", lambda recipe, memory: 3)
    monkeypatch.setattr(max_depth, "try_out", try_out)
    rows = list(max_depth.search(recipe(), CPU, 2**30, 9, until=clock[0] + 25.0))
    assert [row["layers"] for row in rows] == [3, 3, 4]
    assert rows[1]["peak memory (GiB)"] is None


def test_masked_weights_stay_zero_after_every_step():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(40, 50)])
    model = torch.nn.ModuleDict({"decoder": model, "other": torch.nn.Linear(3, 4)})

    class Dense:
        models, choices = [model], "theirs"

        def step(self, add):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += add
            return "result"

    engine = baselines._MaskedEngine(Dense())
    weight = model["decoder"].layers[0].weight
    assert list(engine.masks) == [weight] and engine.choices == "theirs"
    assert engine.step(5.0) == "result"
    (mask,) = engine.masks.values()
    assert torch.equal(weight != 0, mask) and 0.15 < mask.float().mean() < 0.35
    assert (model["other"].weight != 0).all() and baselines.LEVEL == 0.75


def test_quick_weights_are_shards_of_their_kind():
    quick = engines.QuickWeights(CPU)
    drawn = quick.shard(Weight("a.weight", (400, 6), 0, 0, std=0.5), 1, 4)
    assert drawn.shape == (100, 6) and 0.4 < drawn.std() < 0.6
    assert quick.shard(Weight("a.weight", (6, 8), 1, 0, std=1.0), 0, 2).shape == (6, 4)
    assert quick.shard(Weight("norm.weight", (4,), None, 0), 0, 2).tolist() == [1.0] * 4
    assert quick.shard(Weight("norm.bias", (4,), 0, 0), 0, 2).tolist() == [0.0] * 2


def test_synthetic_text_is_predicted_one_token_on(recipe):
    r = recipe(train={"sequence_length": 20})
    batch = engines.synthetic_batch(r, 3)
    assert len(batch) == 4 and batch[0]["tokens"].shape == (2, 20)
    for micro in batch:
        assert torch.equal(micro["tokens"][:, 1:], micro["labels"][:, :-1])
        assert micro["position_ids"].tolist() == [list(range(20))] * 2
        assert micro["loss_mask"].shape == (2, 20) and (micro["loss_mask"] == 1).all()
        assert 200 < micro["tokens"].max() < 256
    assert not torch.equal(batch[0]["tokens"], batch[1]["tokens"])
    again, other = engines.synthetic_batch(r, 3), engines.synthetic_batch(r, 4)
    assert torch.equal(batch[0]["tokens"], again[0]["tokens"])
    assert not torch.equal(batch[0]["tokens"], other[0]["tokens"])


def test_the_peak_is_without_what_others_hold(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    assert engines.peak_of(lambda: calls.append("run"), 300) == 5000 - (1000 - 300)
    assert calls == ["reset", "run"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.peak_of(lambda: calls.append("run")) is None and calls[-1] == "run"


def test_quick_masks_are_those_of_the_first_layer(recipe):
    from megatron_spdf.sparsity.plan import SparseWeight

    planned = Plan.of(recipe(sparsity=0.5)).weights
    first, other = (planned[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 3))
    own = other.draw(0, 1)
    with engines._masks_of_first_layer():
        assert np.array_equal(other.draw(0, 1), first.draw(0, 1))
        assert not np.array_equal(other.draw(0, 1), own)
    assert np.array_equal(other.draw(0, 1), own) and SparseWeight.draw


@pytest.fixture
def one_second(monkeypatch):
    """Every kernel takes a second more than the one before."""
    took = []

    def seconds(run, at_least):
        run()
        took.append(at_least)
        return float(len(took))

    for module in (kernel_throughput, baselines, tiles):
        monkeypatch.setattr(module, "median_seconds", seconds)
    return took


def test_a_copy_is_read_and_written(one_second):
    assert kernel_throughput.copy_bandwidth(CPU, 0.25) == 2 * 2**25 / 1.0
    assert one_second == [0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floors_of_moves_are_the_bytes_they_must_move(recipe, one_second, dtype):
    """Expand reads the active and writes the whole; compress reads the whole, and reads and writes
    the active in fp32; both read a bit a weight."""
    r = recipe(sparsity={"level": 0.75, "pattern": "tile", "tile": 16},
               model={"hidden": 128, "ffn_hidden": 512})
    weight = Plan.of(r).weights["decoder.layers.0.mlp.linear_fc1.weight"]
    expand, compress = kernel_throughput.moves(weight, 0, 2, CPU, dtype, 1e6, 0.5)
    whole, active = 128 * 512 / 2, 128 * 512 / 8
    assert (expand.kernel, compress.kernel) == ("expand", "compress")
    assert expand.floor == pytest.approx((dtype.itemsize * (whole + active) + whole / 8) / 1e6)
    assert compress.floor == pytest.approx((dtype.itemsize * whole + 8 * active + whole / 8) / 1e6)
    layers = kernel_throughput.LAYERS  # in one call
    assert (expand.seconds, compress.seconds, expand.torch) == (1.0 / layers, 2.0 / layers, None)
    assert (expand.shape, expand.sparsity, expand.dense) == ((256, 128), 0.75, None)


def test_layers_in_turn_share_no_tensor(recipe, monkeypatch):
    """So that no cache holds what a kernel reads."""
    read = []

    def timed(run, count, seconds):
        for number in range(count):
            run(number)
        return 1.0

    for name in ("expand", "compress"):
        monkeypatch.setattr(kernel_throughput.dispatch, name,
                            lambda own, mask, *others: read.append([
                                t.data_ptr() for t in (own, mask.bits, mask.index, *others)]))
    monkeypatch.setattr(kernel_throughput, "median_in_turn", timed)
    weight = Plan.of(recipe(sparsity=0.75)).weights["decoder.layers.0.mlp.linear_fc1.weight"]
    kernel_throughput.moves(weight, 0, 1, CPU, torch.float32, 1e6, 0.0)
    for calls in (read[:kernel_throughput.LAYERS], read[kernel_throughput.LAYERS:]):
        assert len(calls) == kernel_throughput.LAYERS
        assert all(len({*places}) == len(calls) for places in zip(*calls, strict=True))


@pytest.mark.parametrize(("pattern", "whole"), [({"pattern": "tile", "tile": 16, "level": 0.75}, 0),
                                                ({"pattern": "2:4", "level": 0.5}, 1)])
def test_floors_of_products_are_the_active_share_of_dense_ones(recipe, one_second, pattern, whole):
    r = recipe(sparsity=pattern, model={"hidden": 128, "ffn_hidden": 512},
               train={"precision": "fp32"})
    weight = Plan.of(r).weights["decoder.layers.0.mlp.linear_fc1.weight"]
    found = kernel_throughput.products(weight, 0, 1, CPU, torch.float32, 64, 0.5)
    assert [f.kernel.split(", ")[1] for f in found] == ["forward", "input gradient",
                                                         "weight gradient"]
    assert [(f.dense, f.seconds) for f in found] == [(1, 2), (3, 4), (5, 6)]
    share = 1.0 - pattern["level"]
    assert [f.floor for f in found] == [share * 1, share * 3, 5.0 if whole else share * 5]


def test_kernels_of_the_first_layer_are_measured(recipe, one_second):
    r = recipe(sparsity={"level": 0.75, "pattern": "tile", "tile": 16},
               model={"hidden": 128, "ffn_hidden": 512}, train={"micro_batch": 4})
    found = kernel_throughput.measure(r, Plan.of(r), 0.5)
    assert (found["tokens"], found["dtype"], found["device_type"]) == (128, "bfloat16", "cpu")
    assert len(found["figures"]) == 4 * 5 and set(one_second) == {0.5}
    assert all(".layers.0." in f["weight"] for f in found["figures"])
    assert found["copy_bytes_per_second"] == 2 * 2**25
    figures = [{**f, "dense": 8.0 if f["dense"] else None, "seconds": 2.0}
               for f in found["figures"]]
    lines = kernel_throughput.render({**found, "figures": figures})
    assert lines[-1].endswith("dense over tiles: 4.000")
    assert kernel_throughput._render_sums([f for f in figures if not f["dense"]]) == []


def test_shapes_of_programs_are_summed_over_weights():
    rows = [{"kernel": k, "program": p, "seconds": s} for k, p, s in (
        ("a", "x", 1e-6), ("a", "y", 3e-6), ("a", "z", 1e-6), ("b", "x", 5e-6), ("a", "x", 2e-6),
        ("a", "y", 1e-6), ("a", "z", None), ("b", "x", 1e-6), ("a", "w", 2e-6))]
    cells = [[c.strip() for c in line.strip("|").split("|")]
             for line in tiles.render(rows)[2].splitlines()[2:]]
    assert cells == [["a", "x", "3", "1.000"], ["a", "y", "4", "0.750"],
                     ["a", "z", "does not fit this GPU", "-"], ["a", "w", "**2**", "1.500"],
                     ["b", "x", "**6**", "1.000"]]


def test_stalls_of_saves_are_medians_of_each_way(recipe, clock, monkeypatch, tmp_path):
    from megatron_spdf.checkpoint import checkpointer, store

    r, done = recipe(sparsity=0.5), []

    class Checkpointer:
        def __init__(self, place, recipe, plan, tokenizer):
            self.path = place

        def save(self, engine, state, measured):
            done.append(state.step)
            clock[0] += 1.0

        def wait(self):
            clock[0] += 10.0 * len(done)
            return SimpleNamespace(error=None, seconds=float(len(done)), path=tmp_path)

    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").write_bytes(b"x" * 23)
    monkeypatch.setattr(checkpointer, "Checkpointer", Checkpointer)
    monkeypatch.setattr(store, "files_of", lambda path: ["a", "b"])
    engine = Engine(clock, [7.0] * 6, r)
    engine.measured_sparsity = dict
    found = save._saves_of(r, engine, tmp_path, 3)
    assert engine.numbers == done == [1, 2, 3, 4, 5, 6]
    assert found == {"sparsity": 0.5, "bytes_on_disk": 123, "write_seconds": 3.5,
                     "stall_seconds_waiting": 31.0, "stall_seconds_behind": 1.0}


def test_what_a_move_adds():
    found = moves._figures([2.0, 4.0, 3.0], [7.0, 6.0, 7.0], [1.0, 9.0, 2.0], 50)
    assert found == {"step_seconds": 3.0, "longer_seconds": 4.0, "longer_quartiles": [2.0, 5.0],
                     "move_seconds": 2.0, "share": 4.0 / 150}


@pytest.mark.slow
def test_a_part_writes_rows_and_begins_nothing_when_time_is_short(tmp_path, clock):
    part = Part(sizes.CPU, tmp_path / "rows", until=clock[0])
    assert part.attempt("t", "a", lambda: part.write("t", n=1)) is True

    def fails():
        raise KeyError("no")

    assert part.attempt("t", "b", fails) is False
    clock[0] += 1.0
    assert part.attempt("t", "c", fails) is False
    rows = suite._tables(suite._rows(tmp_path / "rows"))["t"]
    assert all(row.pop("at") for row in rows)
    assert rows == [{"n": 1}, {"what": "b", "note": "failed, KeyError: 'no'"},
                    {"what": "c", "note": "not begun: the part's time was nearly spent"}]
    assert suite_parts.NEARLY == 0.85


def test_columns_of_training():
    row = train.row_of({
        "sparsity": 0.25, "step_seconds": 2.0, "tokens_per_second": 3.0, "tflops_per_rank": 4.0,
        "mfu": 0.5, "peak_bytes": 3 * 2**29, "state_bytes": {"a": 2**30, "b": 2**29}})
    assert list(row.values()) == [25.0, 2.0, 3.0, 4.0, 50.0, 1.5, 1.5]
    bare = train.row_of({
        "sparsity": 0.0, "step_seconds": 2.0, "tokens_per_second": 3.0, "tflops_per_rank": 4.0,
        "mfu": None, "peak_bytes": None})
    assert list(bare.values())[-3:] == [None, None, None]


@pytest.mark.slow
def test_the_dense_search_has_half_of_the_time(monkeypatch, clock, tmp_path):
    asked = []
    monkeypatch.setattr("benchmarks.engines.joined", contextmanager(lambda recipe: iter([CPU])))
    monkeypatch.setattr(suite_parts, "_search", lambda part, name, recipe, device, until:
                        asked.append((name, recipe.sparsity.level, until - clock[0])))
    suite_parts.largest_model(Part(sizes.CPU, tmp_path / "r", clock[0] + 80.0))
    assert asked == [("dense", 0.0, 40.0), ("unstructured 75%, layer by layer", 0.75, 80.0)]


def test_circumstances_say_when_on_what_and_with_what(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment.sys, "argv", ["tools/x.py", "a b"])
    found = environment.circumstances(("torch", "no-such-library"))
    assert found["versions"] == {"torch": torch.__version__.split("+")[0]} or list(
        found["versions"]) == ["torch"]
    assert found["command"] == "python tools/x.py 'a b'" and (
        re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d[+-]\d\d:\d\d", found["date"]))
    environment.publish({**found, "device": "d", "versions": {"a": "1", "b": "2"}}, ["line"], None)
    assert capsys.readouterr().out == (f"{found['date']}, d, a 1, b 2\n"
                                       "$ python tools/x.py 'a b'\n\nline\n")
    environment.publish(found, [], tmp_path / "o.json")
    assert (tmp_path / "o.json").exists()


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (9999.5, "1e+04"), (12345.6, "12,346"),
                                             (0.123456, "0.1235"), (-20000.0, "-20,000"),
                                             (1234, "1,234"), ("x", "x")])
def test_cells_of_the_suites_tables(value, text):
    assert suite._cell(value) == text


def gmp(recipe, **sections):
    return recipe(sparsity={"level": 0.75, "algorithm": "gmp", "update": {"every": 2}}, **sections)


def test_moves_are_measured_in_the_fullest_part_that_has_some(recipe):
    """Of a run of as many intervals as may be asked for."""
    run = moves._long(gmp(recipe))
    assert run.steps == 200 and run.tokens_per_step == 256
    parts = stages_of(run)
    fullest = moves._fullest(parts)
    due = [[s for s in range(part.first + 1, part.last + 1)
            if run.sparsity.update.due(s, 200)] for part in parts]
    assert list(moves._due_steps(fullest)) == due[parts.index(fullest)] != []
    stored = [p.plan.active for p, steps in zip(parts, due, strict=True)
              if p.plan.weights and steps]
    assert fullest.plan.active == max(stored) > min(stored)
    later = recipe(stages=[{"share": 0.5, "sparsity": 0.5},
                           {"share": 0.5, "sparsity": {"level": 0.5, "algorithm": "set",
                                                       "update": {"every": 2, "stop": 1.0}}}])
    second = stages_of(later)[1]
    assert (second.first, second.begin) == (5, 5)
    assert list(moves._due_steps(second)) == [s for s in range(1, 6) if second.recipe.sparsity
                                              .update.due(s, 5)] != []


def test_borders_are_crossed_part_by_part(recipe, clock, monkeypatch, tmp_path):
    """A step takes 2 s, and the border after the part that ends at step n takes 10 + n."""
    run = recipe(sparsity={"level": 0.75, "algorithm": "acdc"}, train={"tokens": 20 * 256})
    stages, crossed = stages_of(run), []

    def build(recipe, device):
        engine = Engine(clock, [9.0, 2.0, 2.0] * 9, recipe)
        engine.recipe, engine.close = recipe, lambda: crossed.append("closed")
        return engine

    def cross(engine, here, there, place, device, parts):
        clock[0] += 10 + here.last
        parts["built"].append(here.last)
        crossed.append((here.last, there.first, place))
        return engine

    monkeypatch.setattr(moves, "build_engine", build)
    monkeypatch.setattr(moves, "_crossed", cross)
    monkeypatch.setattr(moves, "shared_directory", contextmanager(lambda name: iter([tmp_path])))
    found = moves.measure_one(run, CPU, 3)
    ends = [stage.last for stage in stages]
    assert crossed == [*((end, end, tmp_path) for end in ends[:3]), "closed"]
    assert (found["step_seconds"], found["longer_seconds"]) == (2.0, 10.0 + ends[1])
    assert found["every"] == 20 // (len(stages) - 1) and found["sparsity"] == 0.75
    assert found["share"] == found["longer_seconds"] / found["every"] / 2.0
    assert found["border_seconds"] == {"built": ends[1]}


def test_steps_with_a_move_alternate_with_those_before(recipe, clock, monkeypatch):
    """Two pairs are not counted; a step takes 1 s, the one with a move 4 s and its number more."""
    from megatron_spdf.training import mask_moves

    taken, built = [], []

    class Masks:
        def __init__(self, stage, engine, state, report):
            self.engine, self.state, self.report, self.stage = engine, state, report, stage

        def before_step(self):
            clock[0] += 0.25

        def after_step(self, result):
            at = self.engine.numbers[-1]
            taken.append((at, self.engine.optimizer_steps, self.state.optimizer_steps))
            if at % 2 == 0:
                self.report.moved(1, 3.0 + at)
                clock[0] += 3.0 + at

    def build(recipe, device, quick):
        engine = Engine(clock, [0.75] * 99, recipe)
        engine.recipe, engine.close = recipe, lambda: built.append("closed")
        built.append(engine)
        return engine

    monkeypatch.setattr(mask_moves, "MaskMoves", Masks)
    monkeypatch.setattr(moves, "build_engine", build)
    run = recipe(sparsity={"level": 0.75, "algorithm": "set",
                           "update": {"every": 2, "start": 0.0, "stop": 1.0}})
    found = moves._measure(run, CPU, 3, quick=False)
    due = [step for step in range(1, 10) if run.sparsity.update.due(step, 10)]
    wanted = [(due * 5)[i] for i in range(5)]
    assert [at for at, *_ in taken] == [s for step in wanted for s in (step - 1, step)]
    assert all(mine == theirs == at - 1 for at, mine, theirs in taken)
    longer = sorted(3.0 + step for step in wanted[2:])
    assert (found["step_seconds"], found["longer_seconds"]) == (1.0, longer[1])
    assert found["move_seconds"] == longer[1] and found["share"] == longer[1] / 2
    assert (found["sparsity"], found["every"], built[-1]) == (0.75, 2, "closed")
    assert built[0].tokens == [256 * at for at, *_ in taken]
    (text,) = moves.render_moves({"set": found})
    assert f" {longer[1] / 2:.2%} |" in text


def test_a_tool_is_run_once_with_its_files_and_its_failure_is_told(tmp_path):
    said = tmp_path / "said"
    script = f'echo "$@" > {said}; head -c 20000000 /dev/zero | tail -c 1; exit $0'
    command = ["sh", "-c", script]
    taken = data_throughput._run([*command, "0"], [tmp_path / "a", tmp_path / "b"], tmp_path / "o")
    assert said.read_text().split() == ["--output-prefix", f"{tmp_path}/o", "--input",
                                        f"{tmp_path}/a", f"{tmp_path}/b"]
    assert 0.0 < taken.wall < 60.0 and 0.0 < taken.cpu < 60.0 and taken.memory > 2**20
    with pytest.raises(ValueError, match="-c ended with 3: "):
        data_throughput._run([*command, "3"], [tmp_path / "a"], tmp_path / "o")


def test_the_suite_is_tiny_without_a_gpu(recipe, monkeypatch):
    assert sizes.scale_of("cpu") is sizes.CPU
    assert [sizes.scale_of(name) for name in suite.SCALES[:2]] == [sizes.GPU] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sizes.memory() == 2**22
    r = recipe(train={"precision": "fp32", "micro_batch": 4, "sequence_length": 24})
    assert (sizes.dtype_of(r), sizes.tokens_of(r)) == (torch.float32, 96)
    assert sizes.dtype_of(recipe()) is torch.bfloat16
    assert list(sizes.CPU.patterns)[2:4] == ["tiles of 16, 75%", "tiles of 32, 75%"]
    assert sizes.CPU.recipe("0.0", "seed=7").seed == 7
    assert sizes.CPU.deep_recipe("0.5").model.hidden == 64


def test_products_of_a_peer_are_held_against_dense_ones(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(baselines, "stk_products",
                        lambda weight, *_: iter([("stk, forward", 2e-6, 4e-6)]))
    part = Part(sizes.CPU, tmp_path / "rows", until=0.0)
    suite_parts._stk(part, recipe(sparsity={"level": 0.75, "pattern": "tile", "tile": 16},
                                  model={"hidden": 128, "ffn_hidden": 512}), CPU)
    rows = suite._tables(suite._rows(tmp_path / "rows"))["kernels"]
    assert sorted(row["weight"] for row in rows) == ["128 x 128", "128 x 512", "384 x 128",
                                                     "512 x 128"]
    for row in rows:
        assert (row["time (us)"], row["dense / time"]) == pytest.approx((2.0, 2.0))
        assert row["floor / time"] == pytest.approx(0.25 * 2.0)


def test_without_a_gpu_no_peak_is_shown():
    run = {"engine": "megatron", "choices": "", "sparsity": 0.0, "tokens_per_second": 1.0,
           "step_seconds": 1.0, "tflops_per_rank": 1.0, "mfu": None, "state_bytes": {"a": 2**30}}
    text = train.render_training({"dense": {**run, "peak_bytes": 0},
                                  "sparse": {**run, "peak_bytes": 3 * 2**29}})[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[-2:] for row in cells] == [["-", "1.000"], ["1.50", "1.000"]]


def test_the_planner_is_calibrated_on_the_first_and_predicts_the_others(recipe, monkeypatch):
    """At the efficiency found, the prediction of the first is what was measured."""
    from benchmarks import predictions

    from megatron_spdf.planning.step_time import step_time

    monkeypatch.setattr(predictions, "this_card", lambda: GPUS["h100"])
    big = {"model": {"hidden": 1024, "heads": 16, "layers": 4}, "train": {"sequence_length": 256}}
    made = {"dense": recipe(**big), "other": recipe(sparsity=0.5, **big), "lost": recipe(**big)}
    plans = {name: Plan.of(r) for name, r in made.items()}
    at = step_time(made["dense"], plans["dense"], GPUS["h100"], 0.35).total
    dense, other = predictions.calibrated(made, {"dense": at, "other": 2.0})
    assert dense["efficiency"] == other["efficiency"] == pytest.approx(0.35)
    assert dense["predicted / measured"] == pytest.approx(1.0)
    there = step_time(made["other"], plans["other"], GPUS["h100"], 0.35).total
    assert other["predicted step (s)"] == pytest.approx(there)
    assert other["predicted / measured"] == pytest.approx(there / 2.0)
    with pytest.raises(ValueError, match="dense was not measured, and the planner"):
        predictions.calibrated(made, {"other": 1.0})
