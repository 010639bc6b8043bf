"""The Megatron-Core engine: DDP, pipeline schedules and (distributed) optimizer around our
model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from megatron_spdf.engine import common
from megatron_spdf.engine.base import StepResult
from megatron_spdf.engine.graph import GraphedPass, own_stream
from megatron_spdf.engine.releases import gradients_for_norm
from megatron_spdf.engine.state import OptimizerState, share_replicas, snapshot
from megatron_spdf.layers.compact import expanded
from megatron_spdf.layers.measure import measure_sparsity
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.model.decoder import build_model
from megatron_spdf.model.init import InitialWeights
from megatron_spdf.model.loss import batch_loss
from megatron_spdf.optimizers.base import Optimizer
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


class MegatronEngine:
    """One rank's model chunks with their optimizer.

    Args:
        recipe: the run; its layout is the one the process groups were set up with.
        plan: what is sparse.
        device: of this rank.
        weights: to start from; None: drawn anew.

    Attributes:
        needs_batches: whether this rank needs tokens: on the first and last pipeline stage, and on
            all where attention stops at document boundaries.
        optimizer_steps: updates done, skipped steps not counted; bias correction goes by it.
        updates_ahead: updates are launched before the host knows whether loss and gradients are
            finite, and the device leaves all as it is where they are not. So the GPU does not stand
            still while the host launches them, and the next step's beginning.
    """

    timed = {"optimizer.prepare_grads": "optimizer", "_squared_norm": "optimizer",
             "_update": "optimizer", "_update_ahead": "optimizer"}

    def __init__(self, recipe: Recipe, plan: Plan, device: torch.device,
                 weights: InitialWeights | None = None):
        self.recipe, self.plan, self.device = recipe, plan, device
        if recipe.kernels.cuda_graph:
            own_stream(device)
        self.models = build_model(recipe, plan, weights)
        self.config = self.models[0].config
        overlaps = _overlaps(recipe, device)
        self.chunks = [_data_parallel(recipe, model, overlaps, first=i == 0) for i,
                       model in enumerate(self.models)]
        self.optimizer = _optimizer(recipe, self.chunks, overlaps)
        self.state = OptimizerState(self.optimizer, self.models, recipe)
        self.scheduler = common.make_scheduler(recipe, self.optimizer)
        self.optimizer_steps = 0
        common.correct_newborn(self)
        self.updates_ahead = (device.type == "cuda" and recipe.newborn is None
                              and recipe.optimizer.skips_on_device(self.torch_optimizer))
        self.data_parallel_rank = ps.get_data_parallel_rank()
        # Between the first and the last stage only document boundaries are of interest.
        self.needs_batches = (ps.is_pipeline_first_stage() or ps.is_pipeline_last_stage()
                              or recipe.data.reset_attention)
        self._reports = ps.is_pipeline_last_stage() and ps.get_tensor_model_parallel_rank() == 0
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if overlaps:
            self.config.no_sync_func = _per_chunk([c.no_sync for c in self.chunks])
            self.config.grad_sync_func = _per_chunk([c.start_grad_sync for c in self.chunks])
        self._graphed = None
        if recipe.kernels.cuda_graph:
            self._graphed = GraphedPass(lambda batch: self._run(batch, forward_only=False),
                                        self.models, device)

    def step(self, batch: Sequence[MicroBatch], number: int, tokens: int,
             stop_requested: bool) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batch: `recipe.micro_batches` micro-batches; what it holds is used where `needs_batches`
                only.
            number: of the step, from 1; dropout depends on it and the seed, not on what was drawn
                before.
            tokens: of the schedule at the end of this step; the learning rate is that of this
                point.
            stop_requested: whether this rank was asked to stop; known to all ranks afterwards.
        """
        common.seed_dropout(self.recipe, number)
        common.set_learning_rate(self.scheduler, tokens)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = (self._graphed or partial(self._run, forward_only=False))(batch)
        self.optimizer.prepare_grads()
        parts = common.parts_of(self.models[-1])
        loss, stop, *means, squared_norm = self._agree(
            loss, stop_requested, self._squared_norm(),
            parts=[part * self._reports for part in parts.values()],
            meanwhile=self._update_ahead if self.updates_ahead else None)
        norm, parts = math.sqrt(squared_norm), dict(zip(parts, means, strict=True))
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not (skipped or self.updates_ahead):
            self._update(norm)
        self.optimizer_steps += not skipped
        return StepResult(loss, norm, skipped, stop, parts)

    def evaluate(self, batch: Sequence[MicroBatch], stop_requested: bool) -> tuple[float, bool]:
        """Mean loss over the tokens of a global batch, without dropout or gradients, and whether to
        stop."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            outcome = self._agree(self._run(batch, forward_only=True), stop_requested)
        for chunk in self.chunks:
            chunk.train()
        return outcome

    @property
    def learning_rate(self) -> float:
        return common.learning_rate(self.scheduler)

    @property
    def choices(self) -> str:
        """Implementations that compute the parts of a step, for the log."""
        return common.implementation_summary(self.recipe, self.models[0], self.torch_optimizer,
                                             self.device)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        (inner,) = self.optimizer.chained_optimizers
        return inner.optimizer

    def state_bytes(self) -> dict[str, int]:
        """Bytes of parameters, gradient buffers and optimizer state on this rank, read off the
        buffers themselves."""
        storages = {p.untyped_storage() for model in self.models for p in model.parameters()}
        masters = common.masters_of(self.torch_optimizer)
        state = [self.torch_optimizer.state[p][name] for p in masters
                 for name in self.recipe.states]
        state += [p for p in masters if p.untyped_storage() not in storages]
        return {
            "parameters": sum(s.nbytes() for s in storages),
            "gradients": sum(buffer.grad_data.nbytes for chunk in self.chunks
                             for buffer in chunk.buffers),
            "optimizer": sum(t.nbytes for t in state),
            **common.bytes_beside(self.models[-1]),
        }

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros of every sparse weight as expanded: canonical name -> sparsity, on
        every rank."""
        self._gather_parameters()
        return measure_sparsity(self.models, self.data_parallel_rank, self.plan)

    def state_to_save(self) -> dict:
        """Copies on the CPU of weights, mask bits and optimizer state, as sharded tensors."""
        model = self._sharded_model()
        optimizer = self.state.to_save(model)
        snapshot(model)
        return {"model": model, "optimizer": optimizer}

    def state_to_load(self) -> dict:
        """Sharded tensors for weights, mask bits and optimizer state to be read into."""
        model = self._sharded_model()
        return {"model": model, "optimizer": self.state.to_load(model)}

    def _sharded_model(self) -> dict:
        """Weights and mask bits, chunk name -> key -> ShardedTensor; replicas divide the saving."""
        self._gather_parameters()
        metadata = common.model_metadata()
        group = ps.get_data_parallel_group(with_context_parallel=True)
        model = {f"chunk{i}": common.tensors_only(m.sharded_state_dict(metadata=metadata))
                 for i, m in enumerate(self.models)}
        share_replicas(model, group.rank(), group.size())
        return model

    def load_state(self, loaded: dict, optimizer_steps: int) -> None:
        """Takes a `state_to_load()` that was filled from a checkpoint."""
        for i, model in enumerate(self.models):
            outcome = model.load_state_dict(loaded["model"][f"chunk{i}"], strict=False)
            missing = [k for k in outcome.missing_keys if not k.endswith("_extra_state")]
            assert not missing and not outcome.unexpected_keys, outcome
        self.state.load(loaded["optimizer"], optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def close(self) -> None:
        common.release(self, self.models, *self.chunks)

    def _gather_parameters(self) -> None:
        """With overlapped gathers, a rank's parameters are up to date in the next forward pass
        only, and whoever looks at one before starts a gather that all ranks must join."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def _run(self, batch: Sequence[MicroBatch], forward_only: bool) -> Tensor:
        """Forward, and backward unless `forward_only`, over all micro-batches; the mean loss on
        ranks that report."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(expanded(model, at_once=self.recipe.train.recompute == "full"))
            reports = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, self.device),
                data_iterator=[iter(batch) for _ in self.chunks] if len(self.chunks) > 1
                else iter(batch), model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=self.recipe.micro_batches,
                seq_length=self.recipe.train.sequence_length,
                micro_batch_size=self.recipe.train.micro_batch,
                forward_only=forward_only,
            )
        if not self._reports:
            return torch.zeros((), device=self.device)
        return torch.stack([r["loss"] for r in reports]).mean()

    def _agree(self, loss: Tensor, stop: bool, *others: Tensor,
               **further) -> tuple[float, bool, *tuple[float, ...]]:
        return common.agree(loss, self.recipe.parallel.data, stop, *others, **further)

    def _squared_norm(self) -> Tensor:
        """Squared norm of the gradients of all ranks, (); Megatron-Core's own norm makes the host
        wait for it."""
        (inner,) = self.optimizer.chained_optimizers
        gradients = gradients_for_norm(inner)
        norm = get_total_norm(gradients) if gradients else torch.zeros((), device=self.device)
        squared = norm * norm
        dist.all_reduce(squared, group=inner.get_grad_stats_parallel_group())
        return squared

    def _update(self, norm: float) -> None:
        limit, gradients = self.recipe.optimizer.clip_grad, self._gradients
        if gradients and 0.0 < limit < norm:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # as Megatron-Core clips
        self.optimizer.step_with_ready_grads()

    def _update_ahead(self, agreed: Tensor) -> None:
        """`_update` with what `common.agree` has on the device, in the same digits."""
        limit, gradients = self.recipe.optimizer.clip_grad, self._gradients
        norm = agreed[-1].double().sqrt()
        finite = agreed[0].isfinite() & norm.isfinite()
        self.torch_optimizer.found_inf = (~finite).float()
        if gradients and limit > 0.0:
            factor = torch.where(norm > limit, limit / (norm + 1e-6), 1.0)
            torch._foreach_mul_(gradients, factor.float())
        self.optimizer.step_with_ready_grads()

    @property
    def _gradients(self) -> list[Tensor]:
        """Those of this rank's masters; of few parameters a rank may have none."""
        (inner,) = self.optimizer.chained_optimizers
        return [p.grad for p in inner.get_parameters() if p.grad is not None]


def _forward_step(device: torch.device, data_iterator: Iterator[MicroBatch], model: nn.Module):
    """Megatron-Core's forward step: the loss of a micro-batch, and what is reported of it."""
    return batch_loss(model, common.to_device(next(data_iterator), device)), _reported


def _reported(loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return loss, {"loss": loss.detach().clone()}  # Megatron-Core scales the first in place


def _overlaps(recipe: Recipe, device: torch.device) -> bool:
    """True if traffic is started behind compute: on GPUs, and in a dry run of them on the meta
    device."""
    return recipe.parallel.overlap and recipe.parallel.data > 1 and device.type != "cpu"


def _per_chunk(functions: list):
    return functions if len(functions) > 1 else functions[0]


def _data_parallel(recipe: Recipe, model: nn.Module, overlaps: bool,
                   first: bool) -> DistributedDataParallel:
    zero = recipe.parallel.zero_stage == 1
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=zero,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps and zero,
    )
    # Chunks after the first of an interleaved schedule communicate in one piece: their traffic is
    # not critical.
    return DistributedDataParallel(model.config, config, model, disable_bucketing=not first)


def _optimizer(recipe: Recipe, chunks: list[DistributedDataParallel],
               overlaps: bool) -> MegatronOptimizer:
    """Megatron-Core's wrapper around its own optimizer, or around the recipe's, which then takes
    the place of an Adam: one wrapper takes no other when it is made."""
    o = recipe.optimizer
    options = o.megatron_options()
    config = OptimizerConfig(
        **(options or {"optimizer": "adam"}),
        lr=o.lr,
        min_lr=o.lr * o.min_lr_ratio,
        weight_decay=o.weight_decay,
        clip_grad=o.clip_grad,
        bf16=recipe.train.precision == "bf16",
        params_dtype=chunks[0].config.params_dtype,
        use_distributed_optimizer=recipe.parallel.zero_stage == 1,
        overlap_param_gather=overlaps and recipe.parallel.zero_stage == 1,
    )
    overrides = get_standard_config_overrides(config)
    overrides[ParamKey(predicate=ParamPredicate("no weight decay", common.own_decay))] = {
        "wd_mult": 0.0}
    for peak in common.other_peaks(recipe, chunks):
        overrides[ParamKey(predicate=ParamPredicate(f"learning rate {peak}",
                                                    partial(common.learns_at, peak)))] = {
            **peak.limits(o.min_lr_ratio)}
    optimizer = get_megatron_optimizer(config, chunks, overrides, use_gloo_process_groups=False)
    (inner,) = optimizer.chained_optimizers
    if options is None:
        inner.optimizer = _in_place_of(inner.optimizer, o)
    common.start_state(recipe, inner.optimizer, common.masters_of(inner.optimizer))
    return optimizer


def _in_place_of(adam: torch.optim.Optimizer, settings: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer of the parameters that an Adam has."""
    groups = [{key: value for key, value in group.items() if key not in adam.defaults}
              for group in adam.param_groups]
    # ZeRO-1's shards are views of parameters, which PyTorch refuses when an optimizer is made.
    built = settings.build([group | {"params": [p.detach() for p in group["params"]]}
                            for group in groups])
    for group, own in zip(built.param_groups, groups, strict=True):
        group["params"] = own["params"]
    return built
