"""The closed forms of memory against buffers that Megatron-Core builds on the meta device, to the
byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_spdf.planning import exact
from megatron_spdf.planning.buffers import lay_out
from megatron_spdf.planning.exact import dry_run, dry_runs, ranks_of_interest, render_counts
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.overview import at_level
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PLAN_175B = ROOT / "configs" / "plan" / "gpt3_175b.yaml"


def layout(tensor=1, pipeline=1, data=1, **more) -> dict:
    return {"tensor": tensor, "pipeline": pipeline, "data": data, **more}


SMALL = {"model": {"layers": 12, "hidden": 192, "heads": 12, "vocab_size": 50257,
                   "max_positions": 64},
         "train": {"global_batch": 192, "micro_batch": 1, "sequence_length": 64}}
LAYOUTS = {  # sparsity, layout, precision
    "one": (0.75, layout(), "bf16"),
    "all kinds": (0.75, layout(2, 3, 4, sequence=True), "bf16"),
    "dense": (0.0, layout(4, 2, 3), "fp32"),
    "interleaved": (0.75, layout(1, 2, 8, interleave=3), "bf16"),
    "zero 0": (0.5, layout(3, 4, 2, zero_stage=0), "bf16"),
    "blocks": ({"level": 0.75, "pattern": "tile", "tile": 16}, layout(3, 2, 2), "bf16"),
    "moving blocks": ({"level": 0.75, "pattern": "tile", "tile": 16, "algorithm": "rigl",
                       "update": {"track_ages": True}}, layout(3, 2, 2), "bf16"),
    # not for tensor cores
    "small blocks": ({"level": 0.75, "pattern": "tile", "tile": 8}, layout(6), "fp32"),
    "2:4": ({"level": 0.5, "pattern": "2:4"}, layout(3, 2), "bf16"),
    "layer by layer": ({"level": 0.75, "dense_copy": "per_layer"}, layout(2), "bf16"),
    "straight through": ({"level": 0.75, "algorithm": "ste"}, layout(2, 2, 2), "bf16"),
    "top_kast": ({"level": 0.75, "algorithm": "top_kast"}, layout(3, 2, 2), "bf16"),
    # a bucket for every 64M elements, and the rest
    "many buckets": (0.75, layout(1, 1, 64), "fp32"),
}
RULES = {"level": 0.5, "rules": [{"weights": "decoder.layers.0.*", "level": 0.0}]}


@pytest.fixture(scope="module")
def counts() -> dict:
    """Name -> counts of one rank of every kind; of every rank of "every rank"; "off" is held
    against another plan."""
    def small(level, parallel, precision):
        return Recipe.model_validate({"output": "x", "optimizer": {"lr": 1e-3},
                                      "model": SMALL["model"],
                                      "sparsity": level, "parallel": parallel,
                                      "train": {**SMALL["train"], "tokens": 10**6,
                                                "precision": precision}})

    wanted = {}
    for name, case in LAYOUTS.items():
        r = small(*case)
        wanted[name] = (r, Plan.of(r), ranks_of_interest(r))
    every, off = small(RULES, layout(2, 2, 4), "bf16"), small(0.5, layout(), "bf16")
    wanted["every rank"] = (every, Plan.of(every), list(range(16)))
    wanted["off"] = (off, Plan.of(at_level(off, 0.4)), [0])
    return dict(zip(wanted, dry_runs(list(wanted.values())), strict=True)) | {"recipe": off}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kind_of_rank_is_as_predicted(counts, name):
    for count in counts[name]:
        assert count.counted == count.predicted
        assert count.buckets == count.predicted_buckets


@pytest.mark.slow
def test_every_rank_of_a_layout_is_as_predicted(counts):
    found = counts["every rank"]
    assert [c.place for c in found] == [(rank % 2, rank // 8, rank // 2 % 4) for rank in range(16)]
    assert all(c.agrees for c in found)
    # shards differ by what of them is padding
    assert len({c.counted["optimizer"] for c in found}) > 2


@pytest.mark.slow
def test_another_plan_does_not_agree(counts):
    (count,) = counts["off"]
    assert not count.agrees and "instead of" in render_counts(counts["recipe"], [count])


DRY_RUNS = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from megatron_spdf.planning.exact import dry_runs, ranks_of_interest
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.sparsity.plan import Plan

both = [load_recipe(sys.argv[2], ["sparsity=" + level]) for level in ("0.0", "0.75")]
counts = dry_runs([(r, Plan.of(r), ranks_of_interest(r)) for r in both])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([both[0].parallel.world, [c.agrees for each in counts for c in each], peak]))
"""


@pytest.mark.slow
def test_gpt3_175b_on_1024_ranks_in_little_memory():
    """In a process of its own, so that the memory of its children is that of the dry run."""
    done = subprocess.run([sys.executable, "-c", DRY_RUNS, str(ROOT), str(PLAN_175B)],
                          capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore"})
    world, agree, kilobytes = json.loads(done.stdout)
    assert world == 1024 and len(agree) == 8 and all(agree)
    assert kilobytes < 8 * 2**20


def test_ranks_of_interest_are_of_every_kind_of_stage():
    r = load_recipe(PLAN_175B)
    assert ranks_of_interest(r) == [0, 512, 960, 1023]


def test_a_rank_that_is_not_there(recipe):
    r = recipe(parallel={"data": 2})
    with pytest.raises(ValueError,
                       match="rank 2 is not in this layout of 2 ranks; take one of 0 to 1"):
        dry_run(r, Plan.of(r), [2])


def test_ranks_are_held_against_the_closed_forms(recipe, monkeypatch):
    """Of a dry run of which one byte and one bucket are off."""
    r = recipe(parallel={"tensor": 2, "pipeline": 2, "data": 2}, sparsity=0.5)
    plan, asked = Plan.of(r), []
    held = rank_bytes(r, plan, 1, True, 1)
    buckets = [[end - start for start, end in buffer.buckets]
               for buffer in lay_out(r.model, r.parallel, plan, 1, True)]
    sound = {"place": [1, 1, 1], "buckets": buckets, **{part: getattr(held, part)
                                                        for part in exact.PARTS}}
    found = [sound, sound | {"optimizer": held.optimizer + 1}, sound | {"buckets": [[5]]}]

    def run(words, **options):
        asked.append((words, options))
        return SimpleNamespace(returncode=0, stderr="", stdout=f"said\n{json.dumps([found, []])}\n")

    monkeypatch.setattr(exact.subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    counts, none = dry_runs([(r, plan, [7, 6, 5]), (r, plan, [])])
    assert [c.agrees for c in counts] == [True, False, False] and none == []
    assert [(c.rank, c.place) for c in counts] == [(7, (1, 1, 1)), (6, (1, 1, 1)), (5, (1, 1, 1))]
    ((words, options),) = asked
    assert words[1:] == ["-m", "megatron_spdf.engine.dry_run"]
    requests = json.loads(options["input"])
    assert [request["ranks"] for request in requests] == [[7, 6, 5], []]
    assert requests[0]["recipe"]["kernels"]["attention"] == "sdpa"
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert options["env"]["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"
    lines = render_counts(r, counts).splitlines()
    assert lines[0] == ("built on the meta device, 8 ranks = tensor 2 x pipeline 2 x data 2, "
                        "megatron ZeRO-1")
    rows = [" ".join(line.split()) for line in lines[3:6]]
    assert rows[0].endswith(f"{len(buckets[0])} equal to the byte")
    off = f"optimizer: {held.optimizer:,} instead of {held.optimizer + 1:,} bytes"
    assert rows[1].endswith(off)
    assert rows[2].endswith("other buckets")
    total = sum(counts[0].counted.values()) / 2**30
    assert rows[0].split()[:2] == ["7", "1,1,1"] and f"{total:.4f}" in rows[0]


def test_a_dry_run_that_fails_says_what_it_said(recipe, monkeypatch):
    r = recipe()
    monkeypatch.setattr(exact.subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=3, stderr="x" * 3000 + "the end", stdout=""))
    with pytest.raises(RuntimeError, match="ended with 3:\nx+the end") as caught:
        dry_run(r, Plan.of(r), [0])
    assert len(str(caught.value)) < 2100
    engine = r.model_copy(update={"engine": "deepspeed"})
    with pytest.raises(ValueError, match="engine=deepspeed makes its buffers while it trains.*or "
                                         "set engine=megatron"):
        dry_run(engine, Plan.of(r), [0])
    for rank in (-1, 1):
        with pytest.raises(ValueError, match=f"rank {rank} is not in this layout of 1 rank; "):
            dry_run(r, Plan.of(r), [rank])


@pytest.mark.parametrize(("parallel", "ranks"), [
    ({}, [0]), ({"data": 3}, [0, 2]), ({"tensor": 2, "pipeline": 2, "data": 2}, [0, 4, 7]),
    ({"pipeline": 4, "data": 2}, [0, 4, 6, 7])])
def test_ranks_of_interest(recipe, parallel, ranks):
    assert ranks_of_interest(recipe(parallel=parallel)) == ranks
