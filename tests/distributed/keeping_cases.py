"""What runs on the ranks of test_keeping.py: runs that follow masks of others, and the rules of
STE, SR-STE and Top-KAST on the dense weights of transformers' GPT-2 under plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from followed import choices
from harness import agree_on_port
from plain_gpt2 import as_ours, as_theirs, decayed, learning_rate, linear_weight, micro_loss
from plain_gpt2 import plain_gpt2 as gpt2_of
from pruning_cases import pruned
from stage_cases import _opened
from torch import Tensor

from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.plan import Plan, SparseWeight
from megatron_spdf.sparsity.slices import join_slices, slice_of

# Slice (rows, columns), its weight and the keys -> what is active, what gets a gradient, and what
# times the weight is added to that.
Rule = Callable[[np.ndarray, SparseWeight, dict], tuple[np.ndarray, np.ndarray, np.ndarray]]


def noting(recipe: dict) -> dict:
    """A run of one process that notes its masks: see `pruned`; their file and its keys."""
    file = Path(recipe["output"] + ".choices")
    with choices(note=file) as found:
        return pruned([recipe], [None]) | {"choices": str(file), "keys": set(found.made)}


def following(recipes: list[dict], stops: list[int | None], file: str) -> dict:
    """A run that follows masks of a file; see `pruned` and `Choices.followed`."""
    with choices(follow=Path(file)) as found:
        return pruned(recipes, stops) | found.followed


def plainly(recipe: dict, rule: str) -> dict:
    """A run by a rule of `RULES`, with dense weights, masked in the forward pass.

    Returns:
        Losses of all steps, whole masked weights at the end by name, the file of its choices and
        their keys.
    """
    made, dense = Recipe.model_validate(recipe), Recipe.model_validate(recipe | {"sparsity": 0})
    first, corpus, run = stages_of(dense)[0], check_corpus(made), RunDir(made)
    agree_on_port()
    device = init_distributed(find_ranks(), dense)
    engine, data, _ = _opened(dense, dense, first.plan, run, corpus, device)
    trained = _Kept(gpt2_of(engine.models[0], made), made, RULES[rule])
    losses = [trained.step(number, batch)
              for number, batch in enumerate(data.training_batches(0), 1)]
    engine.close()
    destroy()
    trained.choose()
    file = Path(recipe["output"] + ".choices")
    torch.save(trained.noted, file)
    return {"losses": losses, "weights": trained.masked(), "choices": str(file),
            "keys": set(trained.noted)}


def ste(entries: np.ndarray, w: SparseWeight, update: dict) -> tuple:
    active = largest(entries, round((1 - w.level) * entries.size))
    return active, np.ones_like(active), (update["decay_masked"] or 0.0) * ~active


def largest(entries: np.ndarray, count: int) -> np.ndarray:
    """By a stable sort, so that ties go by position."""
    mask = np.zeros(entries.size, bool)
    mask[np.argsort(-np.abs(entries.ravel()), kind="stable")[:count]] = True
    return mask.reshape(entries.shape)


def n_m(entries: np.ndarray, w: SparseWeight, update: dict) -> tuple:
    groups = entries.reshape(-1, 4)
    active = np.zeros(groups.shape, bool)
    first = np.argsort(-np.abs(groups), axis=1, kind="stable")[:, :2]
    np.put_along_axis(active, first, True, axis=1)
    active = active.reshape(entries.shape)
    return active, np.ones_like(active), 2e-4 * ~active


def top_kast(entries: np.ndarray, w: SparseWeight, update: dict) -> tuple:
    density = 1 - w.level
    active = largest(entries, round(density * entries.size))
    trained = largest(entries, round(update["backward"] * density * entries.size))
    return active, trained, update["penalty"] * (active + (trained & ~active) / density)


RULES: dict[str, Rule] = {"ste": ste, "n_m": n_m, "top_kast": top_kast}


class _Kept:
    """Dense weights, of which a mask goes into the forward pass, and AdamW."""

    def __init__(self, model, recipe: Recipe, rule: Rule):
        self.model, self.recipe, self.rule = model, recipe, rule
        self.update = recipe.sparsity.update.model_dump()
        self.plan = Plan.of(recipe).weights
        self.parameters = {name: linear_weight(model, name) for name in self.plan}
        self.adam = decayed(model, recipe.optimizer)
        if recipe.sparsity.algorithm == "top_kast":  # whose penalty is in place of decay
            held = {id(p) for p in self.parameters.values()}
            group = self.adam.param_groups[0]
            own = [p for p in group["params"] if id(p) in held]
            group["params"] = [p for p in group["params"] if id(p) not in held]
            self.adam.add_param_group({"params": own, "weight_decay": 0.0})
        self.chosen: dict[str, list[Tensor]] = {}
        self.noted: dict[tuple[int, str], list[Tensor]] = {}  # as `followed.Choices` has them
        self.times = 0

    def step(self, number: int, batch: list[dict]) -> float:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.recipe, number * self.recipe.tokens_per_step)
        if (number - 1) % self.update["every"] == 0:
            self.choose()
        dense = {name: p.data.clone() for name, p in self.parameters.items()}
        self.adam.zero_grad()
        for name, p in self.parameters.items():
            p.data *= self.chosen[name][0]
        loss = sum(micro_loss(self.model, micro) for micro in batch) / len(batch)
        loss.backward()
        for name, p in self.parameters.items():
            _, trained, rates = self.chosen[name]
            p.data.copy_(dense[name])
            p.grad = p.grad * trained + rates * p.data
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
        self.adam.step()
        return float(loss)

    @torch.no_grad()
    def choose(self) -> None:
        for name, p in self.parameters.items():
            w = self.plan[name]
            dense = as_ours(self.recipe.model, name, p.data)
            parts = [self.rule(slice_of(dense, w, number).numpy().reshape(w.slice_shape), w,
                               self.update) for number in range(w.slices)]
            self.noted[self.times, name] = [torch.from_numpy(np.packbits(
                [part[kind].ravel() for part in parts], axis=1)) for kind in (0, 1)]
            self.chosen[name] = [
                as_theirs(self.recipe.model, name, join_slices(torch.from_numpy(
                    np.stack([part.ravel() for part in kind]).astype(np.float32)), w))
                for kind in zip(*parts, strict=True)]
        self.times += 1

    def masked(self) -> dict[str, np.ndarray]:
        return {name: as_ours(self.recipe.model, name, p.data * self.chosen[name][0]).numpy()
                for name, p in self.parameters.items()}
