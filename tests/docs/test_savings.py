"""README.md's table of what sparsity buys: each planned and counted figure is the planner's."""

from __future__ import annotations

import json
import re

import pytest
from pages import ROOT

from megatron_spdf.planning.hardware import find_gpu
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.overview import at_level
from megatron_spdf.planning.search import fullest, smallest_world
from megatron_spdf.planning.traffic import step_traffic
from megatron_spdf.recipe.load import load_recipe
from megatron_spdf.schedule.flops import training_flops
from megatron_spdf.sparsity.plan import Plan

README = (ROOT / "README.md").read_text()
GIB = 2**30
LARGEST, XL = "configs/plan/gpt3_175b.yaml", "configs/pretrain/gpt3_xl_s75.yaml"
H100 = find_gpu("h100", "bf16", None, None, None)
ONE = ["parallel.data=1", "train.global_batch=16", "train.micro_batch=8", "train.recompute=full"]


def said(beginning: str) -> tuple[str, str]:
    """The dense and the sparse figure of the row that begins so."""
    (row,) = re.findall(rf"^\| {re.escape(beginning)}[^|]*\| ([^|]*) \| ([^|]*) \|", README, re.M)
    return row


def both(recipe: str, words: list[str], measure) -> tuple:
    """A measure of a recipe dense and at 75%."""
    made = [at_level(load_recipe(ROOT / recipe, words), level) for level in (0.0, 0.75)]
    return tuple(measure(each, Plan.of(each)) for each in made)


def test_gpus():
    worlds = both(LARGEST, [], lambda recipe, plan:
                  smallest_world(recipe, plan, H100).recipe.parallel.world)
    assert said("least number of H100s") == tuple(map(str, worlds))


def test_state():
    """The closed form, to which `--exact` compares real buffers; the first rank has the most."""
    state = both(LARGEST, [], lambda recipe, plan: max(
        rank_bytes(recipe, plan, stage, on_gpu=True).total for stage in (0, 8, 15)))
    assert said("weights, gradients") == tuple(f"{each / GIB:.2f} GiB" for each in state)


def test_memory_of_a_step():
    peaks = both(XL, ONE, lambda recipe, plan: fullest(recipe, plan).peak)
    assert said("memory of a step") == tuple(f"{peak / GIB:.1f} GiB" for peak in peaks)


def test_traffic():
    sent = both(XL, [], lambda recipe, plan: sum(
        bytes for (kind, _), bytes in step_traffic(recipe, plan, 0).items()
        if kind in ("gradients", "parameters")))
    assert said("gradients and parameters that each of 16") == tuple(
        f"{each / GIB:.2f} GiB" for each in sent)


def test_flops():
    flops = both(XL, [], lambda recipe, plan: recipe.steps * recipe.tokens_per_step
                 * training_flops(recipe.model, recipe.train.sequence_length, plan).total)
    assert said("training FLOPs") == tuple(f"{each / 1e18:.1f}e18" for each in flops)


@pytest.mark.parametrize("beginning,page,column", [
    ("checkpoint of a GPT", "docs/benchmarks/save.md", "disk (MiB)")])
def test_measured(beginning, page, column):
    """Near the page of the measurement: files have headers, which grow with the version."""
    text = (ROOT / page).read_text()
    head = next(line for line in text.splitlines() if column in line).split("|")
    place = [cell.strip() for cell in head].index(column)
    rows = re.findall(r"^\| (?:dense|sparse) .*", text, re.M)
    there = [float(row.split("|")[place]) for row in rows[:2]]
    here = [float(figure.split()[0]) for figure in said(beginning)]
    assert here == pytest.approx(there, rel=0.02)


def test_a_step_on_a_gpu():
    """Of the card that the page of the suite is of."""
    report = json.loads((ROOT / "docs/benchmarks/nvidia_h100_80gb_hbm3.json").read_text())
    (trained,) = (part["tables"]["training"] for part in report["parts"]
                  if part["part"] == "training")
    rows = {row["what"]: row for row in trained}
    pair = rows["dense"], rows["unstructured 75%, kept for the step"]
    assert said("time of a step of GPT-3 XL") == tuple(f"{r['step (s)']:.3f} s" for r in pair)
    tiles = rows["dense, one CUDA graph"], rows["tiles of 128, 75%, one CUDA graph"]
    assert said("its time with tiles of 128") == tuple(f"{r['step (s)']:.3f} s" for r in tiles)
    assert said("memory of that step") == tuple(f"{r['peak memory (GiB)']:.1f} GiB" for r in pair)
