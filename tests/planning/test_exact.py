"""The closed forms of memory against buffers that Megatron-Core builds on the meta device, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_spdf.config import load_recipe
from megatron_spdf.planning.exact import dry_run, ranks_of_interest, render_counts
from megatron_spdf.planning.overview import at_level, plan_of

ROOT = Path(__file__).resolve().parents[2]
PLAN_175B = ROOT / "configs" / "plan" / "gpt3_175b.yaml"


def layout(tensor=1, pipeline=1, data=1, **more) -> dict:
    return {"tensor": tensor, "pipeline": pipeline, "data": data, **more}


SMALL = {"model": {"layers": 12, "hidden": 192, "heads": 12, "vocab_size": 50257, "max_positions": 64},
         "train": {"global_batch": 192, "micro_batch": 1, "sequence_length": 64}}


@pytest.mark.slow
@pytest.mark.parametrize(("level", "parallel", "precision"), [
    (0.75, layout(), "bf16"), (0.75, layout(2, 3, 4, sequence=True), "bf16"), (0.0, layout(4, 2, 3), "fp32"),
    (0.75, layout(1, 2, 8, interleave=3), "bf16"), (0.5, layout(3, 4, 2, zero_stage=0), "bf16"),
    (0.75, layout(1, 1, 64), "fp32"),  # a bucket for every 64M elements, and the rest
])
def test_every_kind_of_rank_is_as_predicted(recipe, level, parallel, precision):
    train = {**SMALL["train"], "precision": precision}
    r = recipe(model=SMALL["model"], sparsity=level, parallel=parallel, train=train)
    for count in dry_run(r, plan_of(r), ranks_of_interest(r)):
        assert count.counted == count.predicted
        assert count.buckets == count.predicted_buckets


@pytest.mark.slow
def test_every_rank_of_a_layout_is_as_predicted(recipe):
    rules = {"level": 0.5, "rules": [{"weights": "decoder.layers.0.*", "level": 0.0}]}
    r = recipe(model=SMALL["model"], sparsity=rules, parallel=layout(2, 2, 3), train=SMALL["train"])
    counts = dry_run(r, plan_of(r), list(range(12)))
    assert [c.place for c in counts] == [(rank % 2, rank // 6, rank // 2 % 3) for rank in range(12)]
    assert all(c.agrees for c in counts)
    assert len({c.counted["optimizer"] for c in counts}) > 2  # shards differ by what of them is padding


@pytest.mark.slow
def test_another_plan_does_not_agree(recipe):
    r = recipe(sparsity=0.5)
    (count,) = dry_run(r, plan_of(at_level(r, 0.4)), [0])
    assert not count.agrees and "instead of" in render_counts(r, [count])


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, 0.75])
def test_gpt3_175b_on_1024_ranks_in_little_memory(level):
    """In a process of its own, so that the memory of its children is that of the dry run."""
    code = ("import json, resource, sys; sys.path.insert(0, sys.argv[1]);"
            "from megatron_spdf.config import load_recipe; from megatron_spdf.planning.overview import plan_of;"
            "from megatron_spdf.planning.exact import dry_run, ranks_of_interest;"
            "r = load_recipe(sys.argv[2], ['sparsity=' + sys.argv[3]]);"
            "counts = dry_run(r, plan_of(r), ranks_of_interest(r));"
            "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
            "print(json.dumps([r.parallel.world, [c.agrees for c in counts], peak]))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(PLAN_175B), str(level)], capture_output=True,
                          text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    world, agree, kilobytes = json.loads(done.stdout)
    assert world == 1024 and len(agree) == 4 and all(agree)
    assert kilobytes < 8 * 2**20


def test_ranks_of_interest_are_of_every_kind_of_stage():
    r = load_recipe(PLAN_175B)
    assert ranks_of_interest(r) == [0, 512, 960, 1023]


def test_a_rank_that_is_not_there(recipe):
    r = recipe(parallel={"data": 2})
    with pytest.raises(ValueError, match="rank 2 is not in this layout of 2 ranks; take one of 0 to 1"):
        dry_run(r, plan_of(r), [2])
