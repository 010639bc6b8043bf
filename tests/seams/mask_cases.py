"""What runs on the ranks of test_mask_algorithm.py, which know the algorithm of wander.py."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import sgd_tenant  # noqa: F401
import torch
import torch.distributed as dist
import wander  # noqa: F401
from cases import Bench, bench, masks, overlap_on_cpu
from megatron.core import parallel_state as ps
from plain_gpt2 import learning_rate, micro_loss, plain_gpt2, qkv_order

from megatron_spdf.engine.base import Engine
from megatron_spdf.kernels.mask import pack, unpack
from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.moves import moves_of
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.algorithms.base import Moment
from megatron_spdf.sparsity.moving import moved_masks
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import join_slices
from megatron_spdf.training import loop
from megatron_spdf.training.loop import Trainer


def trained(recipe: dict, stop: int | None = None, overlap: bool = False,
            skip: int | None = None) -> dict:
    """A run from its newest checkpoint to its end, or to a step at which it is asked to stop.

    Args:
        skip: a step whose loss is not finite.

    Returns:
        Losses, masks at the end, records of moves, what run.json says, and bytes that a move sends,
        counted and predicted.
    """
    with overlap_on_cpu() if overlap else nullcontext(), bench(recipe) as b:
        state, _ = b.checkpointer.restore(b.engine)
        b.run.create_on_rank_0()
        log = RunLog(b.run, state.step, b.recipe.steps, False, active=dist.get_rank() == 0)
        watch, sent = _watch(b, stop, skip), []
        with patch.object(loop, "move_masks", checked(loop.move_masks, sent)):
            (stage,) = stages_of(b.recipe)
            Trainer(stage, b.engine, b.data, b.checkpointer, state, log, watch).run()
        log.close()
        dist.barrier()
        records = [json.loads(line) for line in b.run.log.read_text().splitlines()]
        newest = max(b.run.checkpoints.glob("step_*")) / "run.json"
        stage = ps.get_pipeline_model_parallel_rank()
        return {"losses": watch.losses, "masks": masks(b.engine), "sent": sent,
                "predicted": moves_of(b.recipe, b.plan, stage, on_gpu=False),
                "moves": [r for r in records if r["kind"] == "mask"],
                "run": json.loads(newest.read_text())}


def _watch(b: Bench, stop: int | None, skip: int | None) -> SimpleNamespace:
    """A request to stop that comes at a step, and the losses of all steps."""
    watch, step, run = SimpleNamespace(requested=False, losses=[]), b.engine.step, b.engine._run

    def watched(batch, number, tokens, stop_requested):
        poison = float("nan") if number == skip else 1.0
        b.engine._run = lambda *a, **k: run(*a, **k) * poison
        result = step(batch, number, tokens, number == stop)
        watch.losses.append(result.loss)
        return result

    b.engine.step = watched
    return watch


def checked(move, sent: list[int]):
    """`move_masks` that holds what it leaves to what it found, and notes the bytes it sends."""
    def moved(engine: Engine, plan, algorithm, when):
        before = _dense_state(engine)
        with TrafficCounter() as traffic:
            born = move(engine, plan, algorithm, when)
        # all but the counts of the log
        sent.append(traffic.total - 8 * len(plan.weights))
        after = _dense_state(engine)
        for name, (mask, states) in after.items():
            old, old_states = before[name]
            k = plan.weights[name].active_per_slice
            assert (mask.sum(1) == k).all(), name
            assert ((mask & ~old).sum(1) == algorithm.count(k, when)).all(), name
            for key, state in states.items():
                assert torch.equal(state, old_states[key] * mask), (name, key)
                assert state[mask & old].any() and not state[mask & ~old].any()
        assert set(born) == set(plan.weights)
        assert sum(born.values()) == sum(algorithm.count(w.active_per_slice, when) * w.slices
                                         for w in plan.weights.values())
        _check_replicas(engine)
        return born

    return moved


def _dense_state(engine: Engine) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of every sparse weight: masks (slices, entries), and by name the state there, zero elsewhere;
    `weights` is what the model computes with."""
    compacts = {m.parametrizations.weight.original: compact_of(m)
                for model in engine.models for m in sparse_modules(model)}
    found = {c.planned.name: (unpack(c.mask_bits, c.mask.entries), {}) for c in compacts.values()}
    for name in engine.state.names:
        for parameter, values in engine.state.whole(name):
            if compact := compacts.get(parameter):
                mask, states = found[compact.planned.name]
                states[name] = torch.zeros(mask.shape)
                states[name][mask] = values.float().flatten()
    for parameter, compact in compacts.items():
        with getattr(engine, "_gathered", nullcontext)(parameter):
            mask, states = found[compact.planned.name]
            states["weights"] = torch.zeros(mask.shape)
            states["weights"][mask] = parameter.detach().float().flatten()
            assert torch.equal(states["weights"], states[MASTER].to(parameter.dtype).float())
    return found


def _check_replicas(engine: Engine) -> None:
    """That no two ranks have different masks of one slice."""
    all_masks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_masks, masks(engine))
    for key in set().union(*all_masks):
        assert len({found[key] for found in all_masks if key in found}) == 1, key


def plain(recipe: dict) -> list[float]:
    """Losses of transformers' GPT-2 under plain PyTorch, masks multiplied into dense weights and
    their moments, which move as the algorithm says."""
    with bench(recipe) as b:
        o, steps = b.recipe.optimizer, b.recipe.steps
        reference = plain_gpt2(b.engine.models[0], b.recipe)
        parameters = {name: _parameter(reference, name) for name in b.plan.weights}
        bits = {name: _drawn(w, b.plan.seed) for name, w in b.plan.weights.items()}
        adam = torch.optim.AdamW(
            [{"params": [p for p in reference.parameters() if (p.ndim > 1) == decays],
              "weight_decay": o.weight_decay * decays} for decays in (True, False)],
            betas=(o.beta1, o.beta2), eps=o.eps)
        losses, update = [], 0
        for number, batch in enumerate(b.data.training_batches(0), 1):
            for group in adam.param_groups:
                group["lr"] = learning_rate(b.recipe, number * b.recipe.tokens_per_step)
            adam.zero_grad()
            loss = sum(micro_loss(reference, micro) for micro in batch) / len(batch)
            loss.backward()
            for name, parameter in parameters.items():
                parameter.grad *= _dense(b, name, bits[name])
            torch.nn.utils.clip_grad_norm_(reference.parameters(), o.clip_grad)
            adam.step()
            losses.append(float(loss))
            if b.recipe.sparsity.update.due(number, steps):
                update += 1
                when = Moment(update, number, steps)
                for name, parameter in parameters.items():
                    w = b.plan.weights[name]
                    values = torch.zeros(w.slices, w.active_per_slice)
                    bits[name] = moved_masks(b.recipe.sparsity.update, when, w, b.plan.seed, 0,
                                             bits[name], values, None)
                    kept = _dense(b, name, bits[name])
                    for tensor in (parameter.data, adam.state[parameter]["exp_avg"],
                                   adam.state[parameter]["exp_avg_sq"]):
                        tensor *= kept
        return losses


def _drawn(w: SparseWeight, seed: int) -> torch.Tensor:
    """Packed masks, drawn by the plan."""
    return pack(torch.stack([torch.from_numpy(w.draw(seed, c)) for c in range(w.slices)]))


def _parameter(reference, name: str) -> torch.nn.Parameter:
    """Of transformers' GPT-2, by the canonical name."""
    _, _, layer, _, linear, _ = name.split(".")
    block = reference.transformer.h[int(layer)]
    return {"linear_qkv": block.attn.c_attn, "linear_proj": block.attn.c_proj,
            "linear_fc1": block.mlp.c_fc, "linear_fc2": block.mlp.c_proj}[linear].weight


def _dense(b: Bench, name: str, bits: torch.Tensor) -> torch.Tensor:
    """A mask as transformers lays the weight out, (in, out)."""
    w = b.plan.weights[name]
    dense = join_slices(unpack(bits, w.numel // w.slices), w)
    return (dense[qkv_order(b.recipe.model)] if "linear_qkv" in name else dense).T
