"""What runs on the ranks of a distributed test; each function is one case and returns plain values."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from harness import agree_on_port
from megatron.core import parallel_state as ps
from plain_gpt2 import plain_gpt2, train_plain

from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.config import Recipe
from megatron_spdf.config.checks import findings
from megatron_spdf.data.corpus import check_corpus
from megatron_spdf.data.dataset import TokenData
from megatron_spdf.engine import megatron
from megatron_spdf.engine.megatron import MegatronEngine
from megatron_spdf.model.attention import document_mask
from megatron_spdf.model.weights import model_weights
from megatron_spdf.parallel.ranks import find_ranks, join, leave
from megatron_spdf.parallel.signals import StopRequest
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.sparsity.compact import compact_of, densify, sparse_modules
from megatron_spdf.sparsity.measure import SparsityDrift
from megatron_spdf.sparsity.plan import make_plan
from megatron_spdf.training.loop import NotFinite, Trainer
from megatron_spdf.training.run_dir import RunDir
from megatron_spdf.training.run_log import RunLog


class Bench:
    """A recipe's engine and data on this rank."""

    def __init__(self, recipe: dict):
        self.recipe = Recipe.model_validate(recipe)
        assert not list(findings(self.recipe))
        self.plan = make_plan(self.recipe.sparsity, model_weights(self.recipe.model), self.recipe.model.query_groups)
        self.run = RunDir(self.recipe)
        self.corpus = check_corpus(self.recipe)
        agree_on_port()
        self.device = join(find_ranks(), self.recipe)
        self.engine = MegatronEngine(self.recipe, self.plan, self.device)
        self.data = TokenData(self.recipe, self.corpus, self.run.cache, self.engine.reads_data)
        self.checkpointer = Checkpointer(self.run.checkpoints, self.recipe, self.plan, self.corpus.tokenizer)

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of steps first + 1 ... last."""
        outcomes = []
        for number, batch in zip(range(first + 1, last + 1), self.data.training_batches(first), strict=False):
            result = self.engine.step(batch, number, number * self.recipe.tokens_per_step, False)
            outcomes.append((result.loss, result.grad_norm))
        return outcomes


@contextmanager
def bench(recipe: dict):
    opened = Bench(recipe)
    yield opened
    leave()


def abandon() -> None:
    """After a case that raised: whatever is left of its process groups goes."""
    if dist.is_initialized():
        leave()


def masks(engine: MegatronEngine) -> dict[tuple[str, int], str]:
    """(weight, chunk) -> hash of its mask bits, of this rank's chunks."""
    found = {}
    for module in (m for model in engine.models for m in sparse_modules(model)):
        bits = compact_of(module).mask_bits
        first = ps.get_tensor_model_parallel_rank() * len(bits)
        for i, row in enumerate(bits):
            found[compact_of(module).planned.name, first + i] = hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()
    return found


@contextmanager
def overlap_on_cpu():
    """Lets the engine overlap traffic as it does on GPUs; gloo has asynchronous operations too."""
    overlaps = megatron._overlaps
    megatron._overlaps = lambda recipe: recipe.parallel.data > 1
    yield
    megatron._overlaps = overlaps


def overlapped(recipe: dict, steps: int) -> dict:
    with overlap_on_cpu():
        return train(recipe, steps)


def overlapped_cut(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    with overlap_on_cpu():
        return cut(recipes, stops)


def train(recipe: dict, steps: int) -> dict:
    """Losses and gradient norms of `steps` steps, validation loss, masks, measured sparsity, bytes and traffic."""
    with bench(recipe) as b:
        curve = b.steps(0, steps - 1)
        with TrafficCounter() as traffic:
            curve += b.steps(steps - 1, steps)
        valid = [b.engine.evaluate(batch, False)[0] for batch in b.data.validation_batches()]
        return {
            "curve": curve, "valid": valid, "masks": masks(b.engine), "held": b.engine.state_bytes(),
            "sparsity": b.engine.measured_sparsity(),
            "traffic": dict(traffic.bytes), "planned": {n: w.sparsity for n, w in b.plan.weights.items()},
            "predicted": asdict(rank_bytes(b.recipe, b.plan, ps.get_pipeline_model_parallel_rank(), on_gpu=False)),
            "parameters": {n: p.numel() for model in b.engine.models for n, p in model.named_parameters()},
        }


def cut(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    """One run in pieces: a fresh engine for each recipe (layout), restored from the piece before, up to each stop."""
    curve: list[tuple[float, float]] = []
    for recipe, stop in zip(recipes, stops, strict=True):
        with bench(recipe) as b:
            state, _ = b.checkpointer.restore(b.engine)
            assert state.step == len(curve), (state, len(curve))
            curve += b.steps(state.step, stop)
            state = RunState(stop, b.engine.optimizer_steps)
            b.checkpointer.save(b.engine, state, b.engine.measured_sparsity())
    return curve


def densified(recipe: dict, steps: int) -> dict:
    """Largest change of a loss per token and of the weights when a trained model is densified."""
    with bench(recipe) as b:
        b.steps(0, steps)
        batch = next(b.data.validation_batches())[0]
        model = b.engine.models[0].eval()

        def losses() -> torch.Tensor:
            with torch.no_grad():
                return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        before = losses()
        sparse = len(list(sparse_modules(model)))
        densify(model)
        linear = {n: p for n, p in model.named_parameters() if "linear" in n and n.endswith("weight")}
        return {"difference": float((losses() - before).abs().max()), "sparse": sparse,
                "left": len(list(sparse_modules(model))),
                "marked": all(p.tensor_model_parallel for p in linear.values()),
                "zeros": [float((p == 0).float().mean()) for p in linear.values()]}


def against_plain(recipe: dict, steps: int) -> dict:
    """The engine's curve and that of transformers' GPT-2 under plain PyTorch, from the same weights and batches."""
    with bench(recipe) as b:
        reference = plain_gpt2(b.engine.models[0], b.recipe)
        batches = [batch for _, batch in zip(range(steps), b.data.training_batches(0), strict=False)]
        plain = train_plain(reference, b.recipe, batches)
        curve = b.steps(0, steps)
        trained = plain_gpt2(b.engine.models[0], b.recipe).state_dict()
        apart = max(float((trained[n] - p).abs().max()) for n, p in reference.state_dict().items())
        return {"engine": curve, "plain": plain, "weights apart": apart}


def poisoned(recipe: dict, poison: dict[int, str]) -> dict:
    """Steps of which some are poisoned on the last rank: by step, "loss" or "gradient"; with the state around them."""
    with bench(recipe) as b:
        run, found = b.engine._run, []

        def poisoned_run(batch, forward_only):
            kind = poison.get(len(found) + 1) if dist.get_rank() == dist.get_world_size() - 1 else None
            factor = float("inf") if kind == "gradient" else 1.0
            hook = next(b.engine.models[0].decoder.parameters()).register_hook(lambda gradient: gradient * factor)
            loss = run(batch, forward_only)
            hook.remove()
            return loss * float("nan") if kind == "loss" else loss

        b.engine._run = poisoned_run
        for number, batch in zip(range(1, 6), b.data.training_batches(0), strict=False):
            before = state_hash(b.engine)
            result = b.engine.step(batch, number, number * b.recipe.tokens_per_step, False)
            found.append({"skipped": result.skipped, "changed": state_hash(b.engine) != before})
        return {"steps": found, "optimizer_steps": b.engine.optimizer_steps}


def state_hash(engine: MegatronEngine) -> str:
    """Of weights and moments on this rank."""
    digest = hashlib.sha256()
    adam = engine.optimizer.chained_optimizers[0].optimizer
    tensors = [p for model in engine.models for p in model.parameters()]
    tensors += [t for state in adam.state.values() for t in state.values()]
    for tensor in tensors:
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def guarded(recipe: dict, bad_from: int) -> dict:
    """A run whose loss is NaN from a step on: how it ends, and what it has saved."""
    with bench(recipe) as b:
        run, steps = b.engine._run, []

        def poisoned_run(batch, forward_only):
            steps.append(0)
            return run(batch, forward_only) * (float("nan") if len(steps) >= bad_from else 1.0)

        b.engine._run = poisoned_run
        return {"end": ending(b), "saved": sorted(p.name for p in b.run.checkpoints.glob("*"))}


def drifting(recipe: dict) -> dict:
    """A run in which a masked weight comes back: how it ends, and what it has saved."""
    with bench(recipe) as b:
        compact = compact_of(next(sparse_modules(b.engine.models[0])))
        whole = compact.forward
        compact.forward = lambda values: whole(values) + 1e-3
        return {"end": ending(b), "saved": sorted(p.name for p in b.run.checkpoints.glob("*"))}


def ending(b: Bench) -> str:
    b.run.claim()
    log = RunLog(b.run, 0, b.recipe.steps, tensorboard=False, active=dist.get_rank() == 0)
    trainer = Trainer(b.recipe, b.plan, b.engine, b.data, b.checkpointer, RunState(), log, StopRequest())
    try:
        return f"exit code {trainer.run()}"
    except (NotFinite, SparsityDrift) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        log.close()


def samples_of_run(recipe: dict, starts: list[int]) -> dict:
    """This rank's samples of a run that was started at these steps, up to the next start or the end.

    Returns:
        Number in the run -> hash of its tokens and labels, from the run's indices and from what the batches hold; and
        the tokens consumed of each source at each end.
    """
    made = Recipe.model_validate(recipe)
    agree_on_port()
    join(find_ranks(), made)
    found, consumed = {}, []
    for start, end in zip(starts, [*starts[1:], made.steps], strict=True):
        data = TokenData(made, check_corpus(made), RunDir(made).cache, reads=True)
        for step, batch in zip(range(start, end), data.training_batches(start), strict=False):
            for number, micro in enumerate(batch):
                texts = torch.cat([micro["tokens"], micro["labels"]], 1).numpy()
                for place, text in zip(data._indices(step, number), texts, strict=True):
                    assert place not in found
                    found[place] = hashlib.sha256(text.tobytes()).hexdigest()
        consumed.append(data.consumed_tokens(end))
    leave()
    return {"samples": found, "consumed": consumed}


def packed(recipe: dict) -> dict:
    """Losses per token of documents in one sequence, borders observed, and of each of them in a sequence of its own."""
    with bench(recipe) as b:
        b.steps(0, 2)  # away from the initial weights, of which biases are zero
        model, eod = b.engine.models[0].eval(), b.corpus.tokenizer.eod
        draw = torch.Generator().manual_seed(1)
        documents = [torch.randint(0, eod, (length,), generator=draw).tolist() + [eod] for length in (7, 1, 12, 0, 5)]

        def losses(texts: list[list[int]]) -> list[float]:
            sample = b.data.borders.sample(np.array(sum(texts, [])))
            micro = {name: value[None] for name, value in sample.items()}
            mask = document_mask(micro["documents"])
            with torch.no_grad():
                found = model(micro["tokens"], micro["position_ids"], mask, labels=micro["labels"])[0].tolist()
            # The last token of each document predicts the first of the next: not a loss of the document's own.
            ends = [sum(map(len, texts[: i + 1])) - 1 for i in range(len(texts))]
            return [loss for place, loss in enumerate(found) if place not in ends]

        return {"together": losses(documents), "apart": [x for d in documents if len(d) > 1 for x in losses([d])]}
