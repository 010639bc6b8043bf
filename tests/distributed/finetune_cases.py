"""What runs on the ranks of a distributed fine-tuning test, see cases.py."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from cases import Bench, bench, close, masks
from harness import agree_on_port
from megatron.core import parallel_state as ps
from plain_gpt2 import plain_gpt2

from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.checkpoint.reader import find_checkpoint
from megatron_spdf.convert.source import open_weights
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.evaluation.perplexity import Validation
from megatron_spdf.layers.compact import compact_of
from megatron_spdf.model.decoder import build_model, canonical_modules
from megatron_spdf.parallel.ranks import init_distributed
from megatron_spdf.recipe.finetune import Finetune
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.training import loop
from megatron_spdf.training.finetune_setup import prepare


class Tuning:
    """A fine-tuning recipe's engine and data on this rank."""

    def __init__(self, recipe: dict):
        self.finetune = Finetune.model_validate(recipe)
        self.start = open_weights(self.finetune.checkpoint)
        self.prepared = prepare(self.finetune, self.start)
        self.recipe = self.prepared.recipe
        agree_on_port()
        device = init_distributed(find_ranks(), self.recipe)
        self.weights = self.prepared.make_weights()
        self.engine = make_engine(self.recipe, self.prepared.plan, device, self.weights)
        self.data = self.prepared.make_data(self.recipe, self.engine)
        run = RunDir(self.finetune)
        self.checkpointer = Checkpointer(run.checkpoints, self.recipe, self.prepared.plan,
                                         self.prepared.tokenizer)

    def validation_loss(self) -> float:
        losses = [self.engine.evaluate(batch, False)[0] for batch in self.data.validation_batches()]
        return sum(losses) / len(losses)

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        outcomes = []
        for number, batch in zip(range(first + 1, last + 1), self.data.training_batches(first),
                                 strict=False):
            result = self.engine.step(batch, number, number * self.recipe.tokens_per_step, False)
            outcomes.append((result.loss, result.grad_norm))
        return outcomes


@contextmanager
def tuning(recipe: dict):
    opened = Tuning(recipe)
    yield opened
    close(opened)


def finetuned(recipe: dict, steps: int) -> dict:
    """Losses and gradient norms of `steps` steps, validation loss before and after, masks, measured
    sparsity."""
    with tuning(recipe) as t:
        before = t.validation_loss()
        curve = t.steps(0, steps)
        return {"before": before, "curve": curve, "after": t.validation_loss(),
                "masks": masks(t.engine),
                "sparsity": t.engine.measured_sparsity(),
                "planned": {n: w.sparsity for n, w in t.start.plan.weights.items()}}


def cut_finetuning(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    """One fine-tuning run in pieces, see `cases.cut`."""
    curve: list[tuple[float, float]] = []
    for recipe, stop in zip(recipes, stops, strict=True):
        with tuning(recipe) as t:
            state, _ = t.checkpointer.restore(t.engine)
            assert state.step == len(curve), (state, len(curve))
            curve += t.steps(state.step, stop)
            state = RunState(stop, t.engine.optimizer_steps)
            t.checkpointer.save(t.engine, state, t.engine.measured_sparsity())
            assert t.checkpointer.wait().error is None
    return curve


def densified_start(start: dict, recipe: dict) -> dict:
    """Largest difference between the starting run's logits and those of the dense model of
    fine-tuning's first step."""
    with bench(start) as b:
        b.checkpointer.restore(b.engine)
        batch = next(b.data.validation_batches())[0]
        sparse = logits(b, batch)
    with tuning(recipe) as t:
        parameters = sum(p.numel() for p in t.engine.models[0].parameters())
        dense = logits(t, batch)
    return {"difference": float((sparse - dense).abs().max()), "spread": float(sparse.std()),
            "parameters": parameters}


def logits(b: Bench | Tuning, batch: dict) -> torch.Tensor:
    model = b.engine.models[0].eval()
    with torch.no_grad():
        return model(batch["tokens"], batch["position_ids"], None)[..., : b.recipe.model.vocab_size]


def against_plain(recipe: dict, steps: int) -> list[tuple[float, float, float, float]]:
    """(loss, loss of transformers' GPT-2 with the same weights, gradient norm, its gradient norm)
    of every step."""
    outcomes = []
    with tuning(recipe) as t:
        for number, batch in zip(range(1, steps + 1), t.data.training_batches(0), strict=False):
            reference = plain_gpt2(t.engine.models[0], t.recipe)
            loss = plain_loss(reference, batch, t.recipe.train.label_smoothing,
                              t.recipe.model.vocab_size)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), float("inf"))
            result = t.engine.step(batch, number, number * t.recipe.tokens_per_step, False)
            outcomes.append((result.loss, float(loss), result.grad_norm, float(norm)))
    return outcomes


def plain_loss(reference, batch: list[dict], smoothing: float, vocab: int) -> torch.Tensor:
    """Smoothed cross entropy, one pair after the other, mean over the completion tokens of all of
    them."""
    total, count = 0.0, 0
    for micro in batch:
        for tokens, labels, mask in zip(micro["tokens"], micro["labels"],
                                        micro["loss_mask"].bool(), strict=True):
            read = int(mask.nonzero().max()) + 1 if mask.any() else 0
            if read:
                log_p = reference(tokens[None, :read]).logits[0].log_softmax(-1)[mask[:read]]
                hard = -log_p.gather(1, labels[:read][mask[:read], None]).squeeze(1)
                total = total + ((1 - smoothing) * hard - smoothing
                                 * log_p[:, :vocab].mean(1)).sum()
                count += int(mask.sum())
    return total / count


def revived(recipe: dict) -> dict:
    """Of every sparse weight of the start: std of the revived entries over the initial one, and
    whether the others are as they were; with the sums that tell layouts apart."""
    with tuning(recipe) as t:
        rank, world = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
        weights, found = {w.name: w for w in t.recipe.model.weights()}, {}
        (model,) = build_model(t.recipe, t.prepared.plan, t.weights)
        for name, module in canonical_modules(model):
            full = f"{name}.weight"
            if full in t.start.plan.weights:
                before = t.start.weight(full).float().chunk(world, weights[full].axis)[rank]
                here = module.weight.detach()
                assert compact_of(module) is None
                new = here[before == 0]
                found[full] = {"std": float(new.std()) / weights[full].std,
                               "mean": float(new.mean()),
                               "kept": torch.equal(here[before != 0], before[before != 0]),
                               "sum": float(here.sum())}
        return found


def stopped_early(recipe: dict, losses: list[float]) -> dict:
    """A run whose validation losses are these, started twice: how each start ends, at which step,
    and what is saved."""
    ends, given = [], iter(losses)
    for _ in range(2):
        with tuning(recipe) as t, replaced(loop, "validation_loss",
                                          lambda *_: Validation(next(given), None)):
            run = RunDir(t.finetune)
            run.create()
            state, _ = t.checkpointer.restore(t.engine)
            log = RunLog(run, state.step, t.recipe.steps, writers=(),
                         active=dist.get_rank() == 0)
            (stage,) = stages_of(t.recipe)
            trainer = loop.Trainer(stage, t.engine, t.data, t.checkpointer, state, log,
                                   StopRequest())
            ends.append((trainer.run(), state.step, state.tokens == t.data.consumed(state.step)))
            log.close()
    return {"ends": ends, "saved": sorted(p.name for p in run.checkpoints.glob("step_*")),
            "chosen": find_checkpoint(run.root).name, "left": list(given)}


@contextmanager
def replaced(module, name: str, value):
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)
