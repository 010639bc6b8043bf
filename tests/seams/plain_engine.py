"""An engine of our own in one file: plain PyTorch, whole parameters on every replica, no ZeRO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_spdf.planning.buffers import local_parameters
from megatron_spdf.planning.engines import EngineRow
from megatron_spdf.planning.traffic import Traffic
from megatron_spdf.recipe.recipe import ENGINES, Recipe
from megatron_spdf.sparsity.plan import Plan

if TYPE_CHECKING:
    from megatron_spdf.engine.base import StepResult
    from megatron_spdf.model.batch import MicroBatch


class Plain(EngineRow):
    """One model on every rank, in fp32."""

    title = "plain PyTorch"
    engine = "plain_engine:PlainEngine"

    def rule_violations(self, recipe: Recipe) -> Iterator[str]:
        yield from super().rule_violations(recipe)
        if recipe.parallel.tensor > 1:
            yield (f"parallel.tensor={recipe.parallel.tensor}: engine=plain has whole weights on "
                   "every rank; set tensor=1 or another engine")
        if recipe.train.precision != "fp32":
            yield (f"train.precision={recipe.train.precision}: engine=plain has no master weights; "
                   "set precision=fp32 or another engine")

    def data_traffic(self, recipe: Recipe, plan: Plan, stage: int, on_gpu: bool) -> Traffic:
        parameters = local_parameters(recipe.model, recipe.parallel, plan, stage)
        return Counter({("gradients", "all-reduce"): 4 * sum(q.elements for q in parameters[0])})


ENGINES.register("plain", Plain())


class PlainEngine:
    """See the protocol, `megatron_spdf/engine/base.py`; engines are imported here, when one is
    made."""

    needs_batches = True
    timed = {"_reduce": "optimizer", "torch_optimizer.step": "optimizer"}

    def __init__(self, recipe: Recipe, plan: Plan, device, weights=None):
        from megatron.core import parallel_state as ps

        from megatron_spdf.engine import common
        from megatron_spdf.engine.whole_state import WholeState
        from megatron_spdf.model.decoder import build_model

        self.recipe, self.plan, self.device, self._common = recipe, plan, device, common
        self.models = build_model(recipe, plan, weights)
        (self.model,) = self.models
        self.state = WholeState(self.model, recipe)
        self.torch_optimizer = common.build_optimizer(recipe, self.model)
        self.state.attach(self.torch_optimizer, {p: p for p in self.model.parameters()})
        self.scheduler = common.make_scheduler(recipe, self.torch_optimizer)
        self.optimizer_steps = 0
        common.correct_newborn(self)
        self.data_parallel_rank = ps.get_data_parallel_rank()
        self._replicas = ps.get_data_parallel_group(with_context_parallel=True)

    def step(self, batch: Sequence[MicroBatch], number: int, tokens: int,
             stop_requested: bool) -> StepResult:
        from megatron_spdf.engine.base import StepResult

        self._common.seed_dropout(self.recipe, number)
        self._common.set_learning_rate(self.scheduler, tokens)
        self.torch_optimizer.zero_grad()
        loss = self._run(batch, training=True)
        norm = self._reduce()
        loss, stop = self._common.agree(loss, self.recipe.parallel.data, stop_requested)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self.torch_optimizer.step()
            self.optimizer_steps += 1
        return StepResult(loss, norm, skipped=skipped, stop=stop)

    def evaluate(self, batch: Sequence[MicroBatch], stop_requested: bool) -> tuple[float, bool]:
        import torch

        self.model.eval()
        with torch.no_grad():
            loss = self._run(batch, training=False)
        self.model.train()
        return self._common.agree(loss, self.recipe.parallel.data, stop_requested)

    @property
    def learning_rate(self) -> float:
        return self._common.learning_rate(self.scheduler)

    @property
    def choices(self) -> str:
        return self._common.implementation_summary(self.recipe, self.model, self.torch_optimizer,
                                                   self.device)

    def state_bytes(self) -> dict[str, int]:
        held = sum(p.nbytes for p in self.model.parameters())
        states = sum(t.nbytes for master in self.state.masters
                     for name, t in self.torch_optimizer.state[master].items()
                     if name in self.state.names)
        return {"parameters": held, "gradients": held, "optimizer": states}

    def measured_sparsity(self) -> dict[str, float]:
        from megatron_spdf.layers.measure import measure_sparsity

        return measure_sparsity(self.models, self.data_parallel_rank, self.plan)

    def state_to_save(self) -> dict:
        return self.state.to_save()

    def state_to_load(self) -> dict:
        return self.state.to_load()

    def load_state(self, loaded: dict, optimizer_steps: int) -> None:
        self.state.load(loaded, optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def close(self) -> None:
        self._common.release(self, self.models)

    def _run(self, batch: Sequence[MicroBatch], training: bool):
        """Forward, and backward when training, over all micro-batches; the mean loss."""
        import torch

        from megatron_spdf.layers.compact import expanded
        from megatron_spdf.model.loss import batch_loss

        losses = []
        with expanded(self.model, at_once=self.recipe.train.recompute == "full"):
            for micro in batch:
                loss = batch_loss(self.model, self._common.to_device(micro, self.device))
                losses.append(loss.detach())
                if training:
                    (loss / len(batch)).backward()
        return torch.stack(losses).mean()

    def _reduce(self) -> float:
        """Means of the gradients over the replicas, clipped; their norm before."""
        import torch
        import torch.distributed as dist

        parameters = list(self.model.parameters())
        if self._replicas.size() > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad, group=self._replicas)
                parameter.grad /= self._replicas.size()
        limit = self.recipe.optimizer.clip_grad or math.inf
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
