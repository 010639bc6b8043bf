"""What runs on the ranks of test_mask_algorithm.py, which know the algorithm of wander.py."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import sgd_tenant  # noqa: F401
import torch
import torch.distributed as dist
import wander  # noqa: F401
from aged_adam import AgedAdamW
from cases import Bench, bench, masks
from megatron.core import parallel_state as ps
from plain_gpt2 import (
    as_ours,
    as_theirs,
    decayed,
    learning_rate,
    linear_weight,
    micro_loss,
    plain_gpt2,
)

from megatron_spdf.engine.base import Engine
from megatron_spdf.kernels.mask import pack, unpack
from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.optimizers.base import MASTER
from megatron_spdf.optimizers.newborn import AGE
from megatron_spdf.parallel.traffic import TrafficCounter
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.planning.moves import moves_of
from megatron_spdf.runs.run_log import RunLog
from megatron_spdf.schedule.stages import stages_of
from megatron_spdf.sparsity.algorithms.base import MaskAlgorithm, Moment
from megatron_spdf.sparsity.history import NOTHING
from megatron_spdf.sparsity.moving import moved_masks
from megatron_spdf.sparsity.plan import SparseWeight
from megatron_spdf.sparsity.slices import join_slices, slice_of
from megatron_spdf.training import mask_moves
from megatron_spdf.training.loop import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "sparsity"))
from tile_rule import next_tiles, norms, random_births, sums  # noqa: E402


def trained(recipe: dict, stop: int | None = None, skip: int | None = None) -> dict:
    """A run from its newest checkpoint to its end, or to a step at which it is asked to stop.

    Args:
        skip: a step whose loss is not finite.

    Returns:
        Losses, masks at the end, records of moves, what run.json says, and bytes that a move sends,
        counted and predicted.
    """
    with bench(recipe) as b:
        state, _ = b.checkpointer.restore(b.engine)
        b.run.create_on_rank_0()
        log = RunLog(b.run, state.step, b.recipe.steps, writers=(), active=dist.get_rank() == 0)
        watch, sent = _watch(b, stop, skip), []
        with patch.object(mask_moves, "move_masks", checked(mask_moves.move_masks, sent)):
            (stage,) = stages_of(b.recipe)
            Trainer(stage, b.engine, b.data, b.checkpointer, state, log, watch).run()
        log.close()
        dist.barrier()
        records = [json.loads(line) for line in b.run.log.read_text().splitlines()]
        newest = max(b.run.checkpoints.glob("step_*")) / "run.json"
        stage = ps.get_pipeline_model_parallel_rank()
        return {"losses": watch.losses, "masks": masks(b.engine), "active": active(b.engine),
                "sent": sent,
                "products": {type(compact_of(m).product).__name__
                             for model in b.engine.models for m in sparse_modules(model)},
                "predicted": moves_of(b.recipe, b.plan, stage, on_gpu=False),
                "optimizer": (b.engine.state_bytes()["optimizer"], rank_bytes(
                    b.recipe, b.plan, stage, False, b.engine.data_parallel_rank).optimizer),
                "moves": [r for r in records if r["kind"] == "mask"],
                "run": json.loads(newest.read_text())}


def active(engine: Engine) -> dict[tuple[str, int], np.ndarray]:
    """(weight, slice) -> its mask, of this rank's slices."""
    found = {}
    for compact in (compact_of(m) for model in engine.models for m in sparse_modules(model)):
        first = ps.get_tensor_model_parallel_rank() * len(compact.mask_bits)
        for i, mask in enumerate(unpack(compact.mask_bits, compact.mask.entries)):
            found[compact.planned.name, first + i] = mask.cpu().numpy()
    return found


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
    def moved(engine: Engine, algorithm, when):
        before, plan = _dense_state(engine), engine.plan
        with TrafficCounter() as traffic:
            born = move(engine, algorithm, when)
        # all but the counts of the log
        sent.append(traffic.total - 8 * len(astuple(NOTHING)) * len(plan.weights))
        after = _dense_state(engine)
        for name, (mask, states) in after.items():
            old, old_states = before[name]
            w = plan.weights[name]
            assert (mask.sum(1) == w.active_per_slice).all() and not w.fault(mask.numpy()), name
            assert ((mask & ~old).sum(1) == _moved(w, algorithm, when)).all(), name
            for key, state in states.items():
                assert torch.equal(state, old_states[key] * mask), (name, key)
                assert state[mask & old].any() and not state[mask & ~old].any()
            if engine.recipe.newborn:  # ages
                assert set(states[AGE][mask & old].unique().tolist()) <= set(
                    range(1, when.step + 1))
        assert set(born) == set(plan.weights)
        assert {name: change.moved for name, change in born.items()} == {
            name: _moved(w, algorithm, when) * w.slices for name, w in plan.weights.items()}
        _check_replicas(engine)
        return born

    return moved


def _moved(weight: SparseWeight, algorithm: MaskAlgorithm, when: Moment) -> int:
    """Entries of a slice that die in a move; tiles die two by two."""
    unit = math.prod(weight.pattern.moving_unit)
    count = algorithm.count(weight.active_per_slice // unit, when)
    return unit * (count if unit == 1 else count // 2 * 2)


def _dense_state(engine: Engine) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of every sparse weight: masks (slices, entries), and by name the state there, zero elsewhere;
    `weights` is what the model computes with."""
    compacts = {m.parametrizations.weight.original: compact_of(m)
                for model in engine.models for m in sparse_modules(model)}
    found = {c.planned.name: (unpack(c.mask_bits.cpu(), c.mask.entries), {})
             for c in compacts.values()}
    for name in engine.state.names:
        for parameter, values in engine.state.whole(name):
            if compact := compacts.get(parameter):
                mask, states = found[compact.planned.name]
                states[name] = torch.zeros(mask.shape)
                states[name][mask] = values.float().flatten().cpu()
    for parameter, compact in compacts.items():
        with getattr(engine, "_gathered", nullcontext)(parameter):
            mask, states = found[compact.planned.name]
            states["weights"] = torch.zeros(mask.shape)
            states["weights"][mask] = parameter.detach().float().flatten().cpu()
            assert torch.equal(states["weights"], states[MASTER].to(parameter.dtype).float())
    return found


def _check_replicas(engine: Engine) -> None:
    """That no two ranks have different masks of one slice."""
    all_masks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(all_masks, masks(engine))
    for key in set().union(*all_masks):
        assert len({found[key] for found in all_masks if key in found}) == 1, key


def plain(recipe: dict) -> dict:
    """Losses of transformers' GPT-2 under plain PyTorch, masks multiplied into dense weights and
    their moments, which move as the algorithm says; and the masks at the end."""
    with bench(recipe) as b:
        reference = (_Plain if b.recipe.sparsity.pattern == "unstructured" else _PlainTiles)(b)
        losses = [reference.step(number, batch)
                  for number, batch in enumerate(b.data.training_batches(0), 1)]
        return {"losses": losses, "active": {
            (name, c): mask.numpy() for name, bits in reference.bits.items()
            for c, mask in enumerate(unpack(bits, math.prod(b.plan.weights[name].slice_shape)))}}


class _Plain:
    """Dense weights with masks that move."""

    def __init__(self, b: Bench):
        self.recipe, self.plan, self.updates = b.recipe, b.plan, 0
        self.model = plain_gpt2(b.engine.models[0], b.recipe)
        self.parameters = {name: linear_weight(self.model, name) for name in b.plan.weights}
        self.bits = {name: pack(torch.stack([torch.from_numpy(w.draw(b.plan.seed, c))
                                             for c in range(w.slices)]))
                     for name, w in b.plan.weights.items()}
        self.adam = (AgedAdamW(self.model, b.recipe) if b.recipe.newborn
                     else decayed(self.model, b.recipe.optimizer))

    def step(self, number: int, batch: list[dict]) -> float:
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.recipe, number * self.recipe.tokens_per_step)
        self.adam.zero_grad()
        loss = sum(micro_loss(self.model, micro) for micro in batch) / len(batch)
        loss.backward()
        gradients = self._gradients(batch)
        for name, parameter in self.parameters.items():
            parameter.grad *= self._mask(name)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_grad)
        self.adam.step()
        if self.recipe.sparsity.update.due(number, self.recipe.steps):
            self.updates += 1
            for name in self.parameters:
                self._move(name, Moment(self.updates, number, self.recipe.steps), gradients[name])
        return float(loss)

    def _gradients(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """Of the dense weights: of the whole batch, or of its last micro-batch."""
        names, parameters = self.parameters.keys(), list(self.parameters.values())
        found = ([p.grad for p in parameters] if self.recipe.sparsity.update.collects == "step"
                 else torch.autograd.grad(micro_loss(self.model, batch[-1]), parameters))
        return {name: self._ours(name, g).clone() for name, g in zip(names, found, strict=True)}

    def _move(self, name: str, when: Moment, gradient: torch.Tensor) -> None:
        w, parameter = self.plan.weights[name], self.parameters[name]
        dense = self._ours(name, parameter.data)
        whole = torch.stack([slice_of(dense, w, c) for c in range(w.slices)])
        before = self._mask(name)
        self.bits[name] = self._next(w, when, whole, gradient)
        state = self.adam.state[parameter]
        kept = before & self._mask(name)
        for tensor in (parameter.data, *(t for t in state.values() if t.shape == kept.shape)):
            tensor *= kept

    def _next(self, w: SparseWeight, when: Moment, whole: torch.Tensor,
              gradient: torch.Tensor) -> torch.Tensor:
        """Mask bits after a move of slices (C, entries)."""
        bits = self.bits[w.name]
        values = whole[unpack(bits, whole.shape[1])].view(w.slices, -1)
        return moved_masks(self.recipe.sparsity.update, when, w, self.plan.seed, 0, bits, values,
                           gradient)

    def _mask(self, name: str) -> torch.Tensor:
        """As transformers lays the weight out, (in, out)."""
        w = self.plan.weights[name]
        dense = join_slices(unpack(self.bits[name], w.numel // w.slices), w)
        return as_theirs(self.recipe.model, name, dense)

    def _ours(self, name: str, theirs: torch.Tensor) -> torch.Tensor:
        """A weight or its gradient as Megatron-Core lays it out, (out, in)."""
        return as_ours(self.recipe.model, name, theirs)


class _PlainTiles(_Plain):
    """Tiles that SET or RigL moves by the rule of tile_rule.py."""

    def _next(self, w: SparseWeight, when: Moment, whole: torch.Tensor,
              gradient: torch.Tensor) -> torch.Tensor:
        sparsity, masks = self.recipe.sparsity, []
        size, shape = sparsity.masks.tile, w.slice_shape
        for c, mask in enumerate(unpack(self.bits[w.name], whole.shape[1]).numpy()):
            active = mask.reshape(shape)[::size, ::size]
            births = (random_births(active, self.plan.seed, w.name, c, when.update)
                      if sparsity.algorithm == "set"
                      else -norms(slice_of(gradient, w, c).numpy(), shape, size))
            count = sparsity.update.count(int(active.sum()), when)
            tiles = next_tiles(active, sums(whole[c].abs().numpy(), shape, size), births, count)
            masks.append(tiles.repeat(size, 0).repeat(size, 1).reshape(-1))
        return torch.from_numpy(np.packbits(masks, axis=1))
