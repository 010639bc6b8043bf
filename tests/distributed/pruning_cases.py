"""What runs on the ranks of test_pruning.py: runs that prune, and the rules of their papers on the
dense weights of transformers' GPT-2 under plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from followed import prunings
from harness import agree_on_port
from plain_gpt2 import (
    as_ours,
    as_theirs,
    decayed,
    learning_rate,
    linear_weight,
    micro_loss,
    plain_gpt2,
)
from stage_cases import _opened, staged

from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.sparsity.slices import join_slices, slice_of


def pruned(recipes: list[dict], stops: list[int | None]) -> dict:
    """A run to its end, started with each recipe (layout) in turn and stopped after so many steps.

    Returns:
        Losses of all steps, exit codes, whole dense weights at the end by name, and what the log
        says of masks.
    """
    found = staged(recipes, stops)
    losses = [r["loss"] for r in found["records"] if r["kind"] == "train"]
    run = RunDir(Recipe.model_validate(recipes[0]))
    reader = CheckpointReader(find_checkpoint(run.root))
    names = Plan.of(Recipe.model_validate(recipes[0])).weights
    records = map(json.loads, run.log.read_text().splitlines())
    return {"losses": losses, "codes": found["codes"], "records": found["records"],
            "moves": [r for r in records if r["kind"] == "mask"],
            "weights": {name: reader.parameter(name).numpy() for name in names}}


def following(recipes: list[dict], stops: list[int | None], file: str) -> dict:
    """The same with the masks of a file; see `Choices.followed`."""
    with prunings(Path(file)) as found:
        return pruned(recipes, stops) | found.followed


def plain(recipe: dict, rule: str) -> dict:
    """A run by a rule of `RULES`, with dense weights: losses, weights at the end by name, the file
    of its masks and their keys."""
    made = Recipe.model_validate(recipe)
    first, corpus, run = stages_of(made)[0], check_corpus(made), RunDir(made)
    agree_on_port()
    device = init_distributed(find_ranks(), made)
    engine, data, _ = _opened(first.as_single_run, first.recipe, first.plan, run, corpus, device)
    trained = _Plain(plain_gpt2(engine.models[0], made), made, rule)
    losses = [trained.step(number, batch)
              for number, batch in enumerate(data.training_batches(0), 1)]
    engine.close()
    destroy()
    file = Path(recipe["output"] + ".masks")
    torch.save(trained.noted, file)
    return {"losses": losses, "masks": str(file), "keys": set(trained.noted),
            "weights": {name: trained.ours(name, p.data).numpy()
                        for name, p in trained.parameters.items()}}


def gmp(step: int, steps: int, update: dict) -> float | None:
    """s(t) / s after a step at which weights are pruned (Zhu and Gupta 2017, equation 1)."""
    begin, end = update["start"] * steps, update["stop"] * steps
    if step != end and (step % update["every"] or not begin < step < end):
        return None
    return 1.0 - (1.0 - (step - begin) / (end - begin)) ** 3


def acdc(step: int, steps: int, update: dict) -> float | None:
    """1 after a step at which a sparse phase begins, 0 where a dense one does (Peste et al. 2021,
    algorithm 1, with the phases of its ImageNet schedule)."""
    percent = 100 * step / steps
    if percent in (10, 20, 30, 40, 50, 60, 70, 85):
        return 1.0
    return 0.0 if percent in (15, 25, 35, 45, 55, 65, 75) else None


RULES = {"gmp": gmp, "acdc": acdc}


class _Plain:
    """Dense weights, masks beside them, and AdamW."""

    def __init__(self, model, recipe: Recipe, rule: str):
        self.model, self.recipe, self.rule = model, recipe, RULES[rule]
        self.plan = Plan.of(recipe).weights
        self.parameters = {name: linear_weight(model, name) for name in self.plan}
        self.masks = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        self.adam = decayed(model, recipe.optimizer)
        self.noted: dict[tuple[int, str], list[torch.Tensor]] = {}  # as `Choices.made`

    def step(self, number: int, batch: list[dict]) -> float:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.recipe, number * self.recipe.tokens_per_step)
        self.adam.zero_grad()
        loss = sum(micro_loss(self.model, micro) for micro in batch) / len(batch)
        loss.backward()
        for name, parameter in self.parameters.items():
            parameter.grad *= self.masks[name]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
        self.adam.step()
        share = self.rule(number, self.recipe.steps, self.recipe.sparsity.update.model_dump())
        if share is not None:
            for name in self.parameters:
                self._prune(number, name, share)
        return float(loss)

    def _prune(self, number: int, name: str, share: float) -> None:
        w, parameter = self.plan[name], self.parameters[name]
        largest = _largest(self.ours(name, parameter.data), w, share)
        if share:  # no mask is chosen where weights become dense
            self.noted[number, name] = [torch.from_numpy(np.packbits(
                [slice_of(largest, w, each).numpy() != 0 for each in range(w.slices)], axis=1))]
        self.masks[name] = as_theirs(self.recipe.model, name, largest)
        state = self.adam.state[parameter]
        for tensor in (parameter.data, state["exp_avg"], state["exp_avg_sq"]):
            tensor *= self.masks[name]

    def ours(self, name: str, theirs: torch.Tensor) -> torch.Tensor:
        """As Megatron-Core lays a weight out, (out, in)."""
        return as_ours(self.recipe.model, name, theirs)


def _largest(dense: torch.Tensor, w: SparseWeight, share: float) -> torch.Tensor:
    """1 at the largest magnitudes of each slice, by a stable sort."""
    masks = []
    for number in range(w.slices):
        entries = slice_of(dense, w, number).abs().numpy()
        mask = np.zeros(len(entries), np.float32)
        mask[np.argsort(-entries, kind="stable")[: round((1 - w.level * share) * len(entries))]] = 1
        masks.append(torch.from_numpy(mask))
    return join_slices(torch.stack(masks), w)
