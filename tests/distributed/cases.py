"""What runs on the ranks of a distributed test; each function is one case and returns plain
values."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import plain_megatron
import torch
import torch.distributed as dist
from harness import agree_on_port
from live_bytes import LiveBytes
from megatron.core import parallel_state as ps
from plain_gpt2 import plain_gpt2, train_plain

from megatron_spdf.architecture import lm_head
from megatron_spdf.checkpoint import shared_files, store
from megatron_spdf.checkpoint.checkpointer import Checkpointer, RunState
from megatron_spdf.checkpoint.reader import CheckpointReader, find_checkpoint
from megatron_spdf.convert.deepspeed_import import DeepSpeedReader
from megatron_spdf.convert.reshard import reshard
from megatron_spdf.data.pretraining.corpus import check_corpus
from megatron_spdf.data.pretraining.dataset import TokenData
from megatron_spdf.engine import megatron
from megatron_spdf.engine.base import Engine
from megatron_spdf.engine.factory import make_engine
from megatron_spdf.evaluation.coordinate_check import activation_sizes
from megatron_spdf.layers.compact import compact_of, densify, sparse_modules
from megatron_spdf.layers.measure import SparsityDrift
from megatron_spdf.model.attention import document_mask
from megatron_spdf.parallel.ranks import destroy, init_distributed
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.activations import step_bytes
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.traffic import classify, step_traffic
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.recipe.rules import rule_violations
from megatron_spdf.resilience.signals import StopRequest
from megatron_spdf.resilience.world import find_ranks
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.training.loop import NotFinite, Trainer


class Bench:
    """A recipe's engine and data on this rank."""

    def __init__(self, recipe: dict):
        self.recipe = Recipe.model_validate(recipe)
        assert not list(rule_violations(self.recipe))
        self.plan = Plan.of(self.recipe)
        self.run = RunDir(self.recipe)
        self.corpus = check_corpus(self.recipe)
        agree_on_port()
        self.device = init_distributed(find_ranks(), self.recipe)
        self.engine = make_engine(self.recipe, self.plan, self.device)
        self.data = TokenData(self.recipe, self.corpus, self.run.cache, self.engine.needs_batches)
        self.checkpointer = Checkpointer(self.run.checkpoints, self.recipe, self.plan,
                                         self.corpus.tokenizer)

    def steps(self, first: int, last: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of steps first + 1 ... last."""
        outcomes = []
        for number, batch in zip(range(first + 1, last + 1), self.data.training_batches(first),
                                 strict=False):
            result = self.engine.step(batch, number, number * self.recipe.tokens_per_step, False)
            outcomes.append((result.loss, result.grad_norm))
        return outcomes


@contextmanager
def bench(recipe: dict):
    opened = Bench(recipe)
    yield opened
    close(opened)


def close(opened) -> None:
    """Leaves the process groups and lets go of what holds them: their threads poll, and hundreds of
    them slow down every case that follows."""
    vars(opened).pop("engine").close()
    destroy()
    gc.collect()


def abandon() -> None:
    """After a case that raised: whatever is left of its process groups goes."""
    if dist.is_initialized():
        destroy()


def masks(engine: Engine) -> dict[tuple[str, int], str]:
    """(weight, chunk) -> hash of its mask bits, of this rank's chunks."""
    found = {}
    for module in (m for model in engine.models for m in sparse_modules(model)):
        bits = compact_of(module).mask_bits
        first = ps.get_tensor_model_parallel_rank() * len(bits)
        for i, row in enumerate(bits):
            found[compact_of(module).planned.name,
                  first + i] = hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()
    return found


def overlapped(case: Callable, *arguments, **keywords):
    """What a case gives where traffic overlaps with compute as on GPUs; gloo has asynchronous
    operations too."""
    with patch.object(megatron, "_overlaps", lambda recipe, device: recipe.parallel.data > 1):
        return case(*arguments, **keywords)


def train(recipe: dict, steps: int) -> dict:
    """Losses and gradient norms of `steps` steps, validation loss, masks, measured sparsity, bytes
    and traffic, and what multiplied."""
    with bench(recipe) as b:
        curve = b.steps(0, steps - 1)
        with TrafficCounter() as traffic:
            curve += b.steps(steps - 1, steps)
        valid = [b.engine.evaluate(batch, False)[0] for batch in b.data.validation_batches()]
        return {
            "curve": curve, "valid": valid, "masks": masks(b.engine),
            "held": b.engine.state_bytes(), "choices": b.engine.choices,
            "products": {type(compact_of(m).product).__name__
                         for model in b.engine.models for m in sparse_modules(model)},
            "sparsity": b.engine.measured_sparsity(),
            "traffic": dict(traffic.bytes),
            "planned": {n: w.sparsity for n, w in b.plan.weights.items()},
            "predicted": predicted_bytes(b),
            "parameters": {n: p.numel() for model in b.engine.models for n,
                           p in model.named_parameters()},
        }


def planned(recipe: dict, logits_bytes: int = lm_head.LOGITS_BYTES) -> dict:
    """A step, counted and predicted: bytes of buffers, bytes sent, and most bytes of activations
    alive."""
    with patch.object(lm_head, "LOGITS_BYTES", logits_bytes), bench(recipe) as b:
        stage = ps.get_pipeline_model_parallel_rank()
        return {
            **sent_in_a_step(b), "held": b.engine.state_bytes(), "predicted": predicted_bytes(b),
            "alive": peak_alive(b),
            "predicted to be alive": step_bytes(b.recipe, b.plan, stage).total
            + rank_bytes(b.recipe, b.plan, stage, on_gpu=False).expanded,
        }


def planned_traffic(recipe: dict) -> dict:
    with bench(recipe) as b:
        return sent_in_a_step(b)


def sent_in_a_step(b: Bench) -> dict:
    """Bytes by kind and operation of the second step, counted and predicted."""
    b.steps(0, 1)
    with TrafficCounter() as traffic:
        b.steps(1, 2)
    sent = Counter()
    for (operation, group), n in traffic.bytes.items():
        sent[classify(operation, group)] += n
    stage = ps.get_pipeline_model_parallel_rank()
    return {"sent": dict(sent),
            "predicted to be sent": dict(step_traffic(b.recipe, b.plan, stage, on_gpu=False))}


def peak_alive(b: Bench) -> int:
    """Most bytes alive in forward and backward of a step, beside parameters, gradient buffers and
    masks. Gradients are not reduced: gloo copies them for that.

    The least of three: on a busy machine gloo's threads hold a tensor a little after its exchange.
    """
    batch = next(b.data.training_batches(2))
    kept = [t for model in b.engine.models for t in (*model.parameters(), *model.buffers())]
    kept += [buffer.grad_data for chunk in b.engine.chunks for buffer in chunk.buffers]
    for chunk in b.engine.chunks:
        chunk.zero_grad_buffer()
    b.engine.config.finalize_model_grads_func = None
    peaks = []
    for _ in range(3):
        with LiveBytes(kept) as live:
            b.engine._run(batch, forward_only=False)
        peaks.append(live.peak)
    return min(peaks)


def predicted_bytes(b: Bench) -> dict[str, int]:
    found = rank_bytes(b.recipe, b.plan, ps.get_pipeline_model_parallel_rank(), on_gpu=False,
                       data_rank=ps.get_data_parallel_rank())
    return {"parameters": found.parameters, "gradients": found.gradients,
            "optimizer": found.optimizer}


def cut(recipes: list[dict], stops: list[int]) -> list[tuple[float, float]]:
    """One run in pieces: a fresh engine for each recipe (layout), restored from the piece before,
    up to each stop."""
    curve: list[tuple[float, float]] = []
    for recipe, stop in zip(recipes, stops, strict=True):
        with bench(recipe) as b:
            state, _ = b.checkpointer.restore(b.engine)
            assert state.step == len(curve), (state, len(curve))
            curve += b.steps(state.step, stop)
            state = RunState(stop, b.engine.optimizer_steps)
            b.checkpointer.save(b.engine, state, b.engine.measured_sparsity())
            assert b.checkpointer.wait().error is None
    return curve


def go_on(recipe: dict, stop: int) -> list[tuple[float, float]]:
    """The steps from the newest checkpoint of the run directory, if it has one, up to `stop`; saved
    there."""
    with bench(recipe) as b:
        state, _ = b.checkpointer.restore(b.engine)
        curve = b.steps(state.step, stop)
        b.checkpointer.save(b.engine, RunState(stop, b.engine.optimizer_steps),
                            b.engine.measured_sparsity())
        assert b.checkpointer.wait().error is None
    return curve


def damaged(recipe: dict) -> dict[tuple[str, str], str]:
    """(file, damage) -> what a restore says, for every file of a checkpoint, restored to health
    after each."""
    with bench(recipe) as b:
        b.steps(0, 1)
        b.checkpointer.save(b.engine, RunState(1, 1), b.engine.measured_sparsity())
        checkpoint = b.checkpointer.wait().path
        said = {}
        for name in [*store.files_of(checkpoint), store.FILES]:
            for damage in (flip, truncate, Path.unlink):
                file = checkpoint / name
                whole = file.read_bytes()
                on_first(lambda file=file, damage=damage: damage(file))
                try:
                    b.checkpointer.restore(b.engine)
                    said[name, damage.__name__] = "nothing"
                except ValueError as error:
                    said[name, damage.__name__] = str(error)
                on_first(lambda file=file, whole=whole: file.write_bytes(whole))
        b.checkpointer.restore(b.engine)
        return said


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])  # more than the line end of JSON


def on_first(action) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def failing_save(recipe: dict, rank: int) -> dict:
    """A save during which a rank can write no large file, between two that work."""
    with bench(recipe) as b:
        found = {}
        for step, limited in ((1, False), (2, True), (3, False)):
            b.steps(step - 1, step)
            if limited and dist.get_rank() == rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            b.checkpointer.save(b.engine, RunState(step, step), b.engine.measured_sparsity())
            saving = b.checkpointer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE,
                               (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found[step] = (str(saving.error), sorted(p.name for p in b.run.checkpoints.iterdir()),
                           b.checkpointer.failed_in_a_row)
        state, _ = b.checkpointer.restore(b.engine)
        return {**found, "resumed": state.step}


def saved_first(recipe: dict, saves: bool) -> list[tuple[float, float]]:
    """Three steps, after a save that comes before any update if `saves`."""
    with bench(recipe) as b:
        if saves:
            b.checkpointer.save(b.engine, RunState(), b.engine.measured_sparsity())
            assert b.checkpointer.wait().error is None
        return b.steps(0, 3)


def unshared(recipe: dict) -> list[str]:
    """What is said where ranks have directories of their own under one name: of a run that begins,
    and of a save."""
    shared_files.PATIENCE, said = 0.2, []
    with bench(recipe) as b:
        here = Path(f"{recipe['output']} of rank {dist.get_rank()}")
        b.run.root, b.checkpointer.directory = here, here / "checkpoints"
        try:
            b.run.create_on_rank_0()
        except shared_files.NotSharedFilesystem as error:
            said.append(str(error))
        b.checkpointer.save(b.engine, RunState(1, 1), b.engine.measured_sparsity())
        said += [str(b.checkpointer.wait().error), str(store.visible(b.checkpointer.directory))]
        if dist.get_rank() == 0:
            (here / "checkpoints" / store.name_of(2)).mkdir(parents=True)
        try:
            b.checkpointer.restore(b.engine)
        except shared_files.NotSharedFilesystem as error:
            said.append(str(error))
    return said


def saved_behind(recipe: dict) -> dict:
    """Whether steps taken while a checkpoint is written get into it: its own state against that of
    a waiting save."""
    with bench(recipe) as b:
        b.steps(0, 2)
        before = state_hash(b.engine)
        describe = store.describe
        begun, stepped = threading.Event(), threading.Event()
        store.describe = lambda path: (begun.set() or stepped.wait(100)) and describe(path)
        b.checkpointer.save(b.engine, RunState(2, 2), b.engine.measured_sparsity())
        later = b.steps(2, 4)
        early = b.checkpointer.poll() is None  # still being written
        begun.wait(100)
        on_disk = [p.name for p in b.run.checkpoints.iterdir()]
        stepped.set()
        saving = b.checkpointer.wait()
        store.describe = describe
        after = state_hash(b.engine)
        b.checkpointer.restore(b.engine)
        return {"early": early, "on disk": on_disk, "path": saving.path.name,
                "changed": before != after,
                "restored": state_hash(b.engine) == before, "again": b.steps(2, 4) == later}


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
        linear = {n: p for n,
                  p in model.named_parameters() if "linear" in n and n.endswith("weight")}
        return {"difference": float((losses() - before).abs().max()), "sparse": sparse,
                "left": len(list(sparse_modules(model))),
                "marked": all(p.tensor_model_parallel for p in linear.values()),
                "zeros": [float((p == 0).float().mean()) for p in linear.values()]}


def against_plain(recipe: dict, steps: int) -> dict:
    """The engine's curve and that of transformers' GPT-2 under plain PyTorch, from the same weights
    and batches."""
    with bench(recipe) as b:
        reference = plain_gpt2(b.engine.models[0], b.recipe)
        batches = [batch for _,
                   batch in zip(range(steps), b.data.training_batches(0), strict=False)]
        plain = train_plain(reference, b.recipe, batches)
        curve = b.steps(0, steps)
        trained = plain_gpt2(b.engine.models[0], b.recipe).state_dict()
        apart = max(float((trained[n] - p).abs().max()) for n, p in reference.state_dict().items())
        return {"engine": curve, "plain": plain, "weights apart": apart}


def saved_by_deepspeed(recipe: dict, steps: int, directory: str) -> float:
    """Largest difference of a weight between DeepSpeed's own checkpoint, which stays in the
    directory, and ours."""
    with bench(recipe) as b:
        b.steps(0, steps)
        b.engine.zero.save_checkpoint(directory)
        b.checkpointer.save(b.engine, RunState(steps, steps), b.engine.measured_sparsity())
        saving = b.checkpointer.wait()
        assert saving.error is None
        ours, theirs = CheckpointReader(saving.path), DeepSpeedReader(Path(directory),
                                                                      b.recipe.model)
        return max(float((ours.master(name) - theirs.master(name)).abs().max())
                   for name in ours.weights)


def poisoned(recipe: dict, poison: dict[int, str]) -> dict:
    """Steps of which some are poisoned on the last rank: by step, "loss" or "gradient"; with the
    state around them."""
    with bench(recipe) as b:
        run, found = b.engine._run, []

        def poisoned_run(*arguments, **keywords):
            kind = poison.get(len(found)
                              + 1) if dist.get_rank() == dist.get_world_size() - 1 else None
            factor = float("inf") if kind == "gradient" else 1.0
            parameter = next(b.engine.models[0].decoder.parameters())
            hook = parameter.register_hook(lambda gradient: gradient * factor)
            loss = run(*arguments, **keywords)
            hook.remove()
            return loss * float("nan") if kind == "loss" else loss

        b.engine._run = poisoned_run
        for number, batch in zip(range(1, 6), b.data.training_batches(0), strict=False):
            before = state_hash(b.engine)
            result = b.engine.step(batch, number, number * b.recipe.tokens_per_step, False)
            found.append({"skipped": result.skipped, "changed": state_hash(b.engine) != before})
        return {"steps": found, "optimizer_steps": b.engine.optimizer_steps}


def state_hash(engine: Engine) -> str:
    """Of weights and moments on this rank."""
    digest = hashlib.sha256()
    adam = engine.torch_optimizer
    tensors = [getattr(p, "ds_tensor", p) for model in engine.models for p in model.parameters()]
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
    b.run.create()
    log = RunLog(b.run, 0, b.recipe.steps, writers=(), active=dist.get_rank() == 0)
    (stage,) = stages_of(b.recipe)
    trainer = Trainer(stage, b.engine, b.data, b.checkpointer, RunState(), log, StopRequest())
    try:
        return f"exit code {trainer.run()}"
    except (NotFinite, SparsityDrift) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        log.close()


def converted(recipe: dict, stop: int, ids: torch.Tensor, greedy: int = 0) -> dict:
    """A run that was restored, trained up to a step and saved: logits before and after, on the
    ranks that have them, losses, masks, and the text of the first row with `greedy` likeliest
    tokens after it, before the training."""
    with bench(recipe) as b:
        state, _ = b.checkpointer.restore(b.engine)
        before = logits(b.engine, ids)
        prompt = ids[:1]
        for _ in range(greedy):
            prompt = torch.cat([prompt, next_token(b, logits(b.engine, prompt))], dim=1)
        curve = b.steps(state.step, stop)
        b.checkpointer.save(b.engine, RunState(stop, b.engine.optimizer_steps),
                            b.engine.measured_sparsity())
        assert b.checkpointer.wait().error is None
        return {"before": before, "after": logits(b.engine, ids), "curve": curve,
                "masks": masks(b.engine),
                "text": b.corpus.tokenizer.decode(prompt[0].tolist())}


def logits(engine: Engine, ids: torch.Tensor) -> torch.Tensor | None:
    """(B, T, V) on the last pipeline stage, None elsewhere."""
    for chunk in engine.chunks:
        chunk.eval()
    found = plain_megatron.logits(engine.chunks, ids)
    for chunk in engine.chunks:
        chunk.train()
    return None if found is None else found[..., : engine.recipe.model.vocab_size]


def next_token(b: Bench, found: torch.Tensor | None) -> torch.Tensor:
    """The likeliest one, (B, 1), on every rank."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    if found is not None:
        token = found[:, -1:].argmax(-1)
    dist.broadcast(token, src=dist.get_world_size() - 1)
    return token


def resharded(source: str, recipe: dict, stop: int, ids: torch.Tensor) -> dict:
    """`converted`, of a run whose newest checkpoint was rewritten for the recipe's layout by one
    rank."""
    if os.environ["RANK"] == "0":
        reader = CheckpointReader(find_checkpoint(Path(source)), checksums=True)
        reshard(reader, Recipe.model_validate(recipe).parallel, Path(recipe["output"]))
    return converted(recipe, stop, ids)


def through_megatron(directory: str, saved: str, shape: dict,
                     ids: torch.Tensor) -> torch.Tensor | None:
    """`plain_megatron.load_and_save` on these ranks."""
    agree_on_port()
    return plain_megatron.load_and_save(directory, saved, shape, ids)


def samples_of_run(recipe: dict, starts: list[int]) -> dict:
    """This rank's samples of a run that was started at these steps, up to the next start or the
    end.

    Returns:
        Number in the run -> hash of its tokens and labels, from the run's indices and from what the
        batches hold; and the tokens consumed of each source at each end.
    """
    made = Recipe.model_validate(recipe)
    agree_on_port()
    init_distributed(find_ranks(), made)
    found, consumed = {}, []
    for start, end in zip(starts, [*starts[1:], made.steps], strict=True):
        data = TokenData(made, check_corpus(made), RunDir(made).cache, reads=True)
        for step, batch in zip(range(start, end), data.training_batches(start), strict=False):
            for number, micro in enumerate(batch):
                texts = torch.cat([micro["tokens"], micro["labels"]], 1).numpy()
                for place, text in zip(data._indices(step, number), texts, strict=True):
                    assert place not in found
                    found[place] = hashlib.sha256(text.tobytes()).hexdigest()
        consumed.append(data.consumed_by_source(end))
    destroy()
    return {"samples": found, "consumed": consumed}


def packed(recipe: dict) -> dict:
    """Losses per token of documents in one sequence, boundaries observed, and of each of them in a
    sequence of its own."""
    with bench(recipe) as b:
        b.steps(0, 2)  # away from the initial weights, of which biases are zero
        model, eod = b.engine.models[0].eval(), b.corpus.tokenizer.eod
        draw = torch.Generator().manual_seed(1)
        documents = [torch.randint(0, eod, (length,), generator=draw).tolist() + [eod]
                     for length in (7, 1, 12, 0, 5)]

        def losses(texts: list[list[int]]) -> list[float]:
            sample = b.data.boundaries.sample(np.array(sum(texts, [])))
            micro = {name: value[None] for name, value in sample.items()}
            mask = document_mask(micro["documents"])
            with torch.no_grad():
                found = model(micro["tokens"], micro["position_ids"], mask,
                              labels=micro["labels"])[0].tolist()
            # The last token of each document predicts the first of the next: not a loss of the
            # document's own.
            ends = [sum(map(len, texts[: i + 1])) - 1 for i in range(len(texts))]
            return [loss for place, loss in enumerate(found) if place not in ends]

        return {"together": losses(documents),
                "apart": [x for d in documents if len(d) > 1 for x in losses([d])]}


def coordinates(recipe: dict, steps: int) -> dict[str, float]:
    """Sizes of activations in the last of the first steps."""
    agree_on_port()
    return activation_sizes(Recipe.model_validate(recipe), steps)[-1]
