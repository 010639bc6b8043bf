"""Learning rates and initial spreads by group of weights, on ranks and in plain PyTorch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from cases import Bench, bench
from plain_gpt2 import adamw, micro_loss, plain_gpt2

from megatron_spdf.checkpoint.checkpointer import RunState

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import convert_checkpoint  # noqa: E402


def in_parts(recipe: dict, stops: list[int]) -> dict[str, list]:
    """A run that is stopped, saved and begun anew at each of these steps: (loss, gradient norm) of
    every step, and the rates that groups of parameters had in it, with their weight decay."""
    curve, rates = [], []
    for stop in stops:
        with bench(recipe) as b:
            state, _ = b.checkpointer.restore(b.engine)
            assert state.step == len(curve)
            done = _steps(b, state.step, stop)
            curve, rates = curve + done["curve"], rates + done["rates"]
            b.checkpointer.save(b.engine, RunState(stop, b.engine.optimizer_steps),
                                b.engine.measured_sparsity())
            assert b.checkpointer.wait().error is None
    return {"curve": curve, "rates": rates}


def _steps(b: Bench, first: int, last: int) -> dict[str, list]:
    curve, rates = [], []
    for step in range(first, last):
        curve += b.steps(step, step + 1)
        rates.append(sorted((group["weight_decay"], group["lr"])
                            for group in b.engine.torch_optimizer.param_groups))
    return {"curve": curve, "rates": rates}


def branched(trunk: dict, words: list[str], recipe: dict, at: int) -> dict[str, list]:
    """A trunk up to a step, and from there to its end a branch, which these words make."""
    first = in_parts(trunk, [at])
    if os.environ["RANK"] == "0":
        assert convert_checkpoint.main(["branch", trunk["output"], recipe["output"], *words]) == 0
    with bench(recipe) as b:
        state, _ = b.checkpointer.restore(b.engine)
        assert state.step == at
        rest = _steps(b, at, b.recipe.steps)
    return {key: first[key] + rest[key] for key in first}


def plain(recipe: dict, peaks: dict[str, float],
          shares: list[float]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of transformers' GPT-2 under plain PyTorch.

    Args:
        peaks: "linear", "embedding", "norm" -> peak learning rate.
        shares: of it, for every step.
    """
    with bench(recipe) as b:
        o, curve = b.recipe.optimizer, []
        reference = plain_gpt2(b.engine.models[0], b.recipe)
        named = {name: p for name, p in reference.named_parameters() if name != "lm_head.weight"}
        masks = {name: p != 0 for name, p in named.items() if ".h." in name and p.ndim == 2}
        groups = [{"params": [p for name, p in named.items() if _group(name, p) == group],
                   "weight_decay": 0.0 if group == "norm" else o.weight_decay} for group in peaks]
        optimizer = adamw(groups, o)
        for share, batch in zip(shares, b.data.training_batches(0), strict=False):
            for group, peak in zip(optimizer.param_groups, peaks.values(), strict=True):
                group["lr"] = peak * share
            optimizer.zero_grad()
            loss = sum(micro_loss(reference, micro) for micro in batch) / len(batch)
            loss.backward()
            for name, mask in masks.items():
                named[name].grad *= mask
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), o.clip_grad)
            optimizer.step()
            curve.append((float(loss), float(norm)))
        return curve


def _group(name: str, parameter: torch.nn.Parameter) -> str:
    if parameter.ndim == 1:
        return "norm"
    return "linear" if ".h." in name else "embedding"


def spreads(recipe: dict) -> dict[str, float]:
    """Name in the module -> std of the initial values."""
    with bench(recipe) as b:
        return {name: float(p.std()) for name, p in b.engine.models[0].named_parameters()
                if p.ndim > 1}
