"""The DeepSpeed engine: ZeRO 0 to 3 around the same Megatron-Core model, tensor-parallel or not."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from megatron_spdf.architecture.base import HEAD_NORMS
from megatron_spdf.engine import common
from megatron_spdf.engine.base import StepResult
from megatron_spdf.engine.deepspeed_settings import deepspeed_settings
from megatron_spdf.engine.deepspeed_state import ZeroState
from megatron_spdf.layers.compact import expanded
from megatron_spdf.layers.measure import measure_sparsity
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.model.decoder import build_model
from megatron_spdf.model.init import InitialWeights
from megatron_spdf.model.loss import batch_loss
from megatron_spdf.parallel import fake_cuda
from megatron_spdf.planning.memory import rank_bytes
from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.sparsity.plan import Plan


class Guard:
    """Mixin of an optimizer that updates nothing while `held`: DeepSpeed steps its optimizer
    whatever the loss, and one of its wrappers even while it sets itself up."""

    held = True

    def step(self, closure=None):
        return None if self.held else super().step(closure)


def guarded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with a `Guard`."""
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (Guard, kind), {"__module__": kind.__module__})
    return optimizer


class ModelParallelUnit:
    """What DeepSpeed asks its `mpu` for, in Megatron-Core's present names."""

    get_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_data_parallel_world_size = staticmethod(ps.get_data_parallel_world_size)
    get_data_parallel_rank = staticmethod(ps.get_data_parallel_rank)
    get_data_parallel_group = staticmethod(ps.get_data_parallel_group)


class DeepSpeedEngine:
    """One rank's model with its optimizer, sharded as `parallel.zero_stage` says; see the Engine
    protocol.

    Args:
        recipe: the run; its layout is the one the process groups were set up with.
        plan: what is sparse.
        device: of this rank.
        weights: to start from; None: drawn anew.
    """

    needs_batches = True  # there are no pipeline stages
    timed = {"zero.forward": "forward", "zero.backward": "backward", "zero.step": "optimizer",
             "_clip_whole_gradients": "optimizer", "backend.all_gather_function": "communication",
             "backend.reduce_scatter_function": "communication"}

    def __init__(self, recipe: Recipe, plan: Plan, device: torch.device,
                 weights: InitialWeights | None = None):
        deepspeed = _import_deepspeed(device)
        settings = _accepted_settings(recipe)
        self.recipe, self.plan, self.device = recipe, plan, device
        self.models = build_model(recipe, plan, weights)
        (self.model,) = self.models
        # keeps two of PyTorch's collectives, out of reach of whoever replaces them there
        self.backend = sys.modules["deepspeed.comm.comm"].cdb
        _sum_partial_gradients(self.model, recipe.parallel.tensor)
        self.torch_optimizer = guarded(common.build_optimizer(recipe, self.model))
        # while every rank holds whole parameters
        self.state = ZeroState(self.model, recipe)
        self.zero, *_ = deepspeed.initialize(model=self.model, optimizer=self.torch_optimizer,
                                             mpu=ModelParallelUnit, config=settings,
                                             dist_init_required=False)
        self.state.attach(self.torch_optimizer, self.zero.optimizer)
        self.scheduler = common.make_scheduler(recipe, self.torch_optimizer)
        self.optimizer_steps = 0
        common.correct_newborn(self)
        self.data_parallel_rank = ps.get_data_parallel_rank()
        self._reports = ps.get_tensor_model_parallel_rank() == 0

    def step(self, batch: Sequence[MicroBatch], number: int, tokens: int,
             stop_requested: bool) -> StepResult:
        """See the protocol. DeepSpeed reduces, clips and updates in its `step`, so a loss that is
        not finite can only hold the update back there; gradients that are not finite it finds
        itself."""
        common.seed_dropout(self.recipe, number)
        common.set_learning_rate(self.scheduler, tokens)
        loss = self._run(batch, training=True)
        parts = common.parts_of(self.model)
        loss, stop, *means = common.agree(
            loss, self.recipe.parallel.data, stop_requested,
            parts=[part * self._reports for part in parts.values()])
        ours = self.torch_optimizer
        norm = self._clip_whole_gradients() if self.zero.optimizer is ours else None
        ours.held = not math.isfinite(loss) or norm is not None and not math.isfinite(norm)
        self.zero.step()
        overflow = getattr(self.zero.optimizer, "overflow", False)
        if norm is None:
            norm = math.inf if overflow else float(self.zero.get_global_grad_norm())
        skipped = ours.held or overflow
        ours.held = True
        self.optimizer_steps += not skipped
        return StepResult(loss, norm, skipped, stop, dict(zip(parts, means, strict=True)))

    def evaluate(self, batch: Sequence[MicroBatch], stop_requested: bool) -> tuple[float, bool]:
        """Mean loss over the tokens of a global batch, without dropout or gradients, and whether to
        stop."""
        self.zero.eval()
        with torch.no_grad():
            outcome = common.agree(self._run(batch, training=False), self.recipe.parallel.data,
                                   stop_requested)
        self.zero.train()
        return outcome

    @property
    def learning_rate(self) -> float:
        return common.learning_rate(self.scheduler)

    @property
    def choices(self) -> str:
        """Implementations that compute the parts of a step, for the log."""
        wrapper = type(self.zero.optimizer).__name__
        summary = common.implementation_summary(self.recipe, self.model, self.torch_optimizer,
                                                self.device)
        return f"{summary}; DeepSpeed {wrapper}"

    def state_bytes(self) -> dict[str, int]:
        """Bytes of parameters and optimizer state on this rank as they are held; of gradients,
        which DeepSpeed frees in every step, by closed form."""
        state = [self.torch_optimizer.state[m][name] for m in self.state.masters
                 for name in self.recipe.states]
        state += [m for m in self.state.masters if m.dtype != self.model.config.params_dtype]
        return {
            "parameters": sum(getattr(p, "ds_tensor", p).nbytes for p in self.model.parameters()),
            "gradients": rank_bytes(self.recipe, self.plan, 0,
                                    on_gpu=self.device.type == "cuda").gradients,
            "optimizer": sum(t.nbytes for t in state),
            **common.bytes_beside(self.model),
        }

    def measured_sparsity(self) -> dict[str, float]:
        """Fraction of zeros of every sparse weight as expanded: canonical name -> sparsity, on
        every rank."""
        return measure_sparsity(self.models, self.data_parallel_rank, self.plan, self._gathered)

    def state_to_save(self) -> dict:
        """Copies on the CPU of weights, mask bits and optimizer state, as sharded tensors of the
        Megatron engine's form."""
        return self.state.to_save()

    def state_to_load(self) -> dict:
        """Sharded tensors for weights, mask bits and optimizer state to be read into."""
        return self.state.to_load()

    def load_state(self, loaded: dict, optimizer_steps: int) -> None:
        """Takes a `state_to_load()` that was filled from a checkpoint."""
        self.state.load(loaded, optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def close(self) -> None:
        self.zero.destroy()
        # ZeRO-3's, of all engines
        sys.modules["deepspeed.runtime.zero.parameter_offload"].FWD_MODULE_STACK.clear()
        common.release(self, self.models, self.zero, self.zero.optimizer)

    def _run(self, batch: Sequence[MicroBatch], training: bool) -> Tensor:
        """Forward, and backward when training, over all micro-batches; the mean loss on ranks that
        report.

        The last backward is the boundary of gradient accumulation; its `step` is the caller's.
        """
        losses = []
        # ZeRO-3 frees parameters after use, so no dense copy of them outlives its layer.
        keep = nullcontext() if self._sharded else expanded(self.model,
                                                            at_once=self.recipe.train.recompute
                                                            == "full")
        with keep:
            for number, micro in enumerate(batch):
                loss = batch_loss(self.zero, common.to_device(micro, self.device))
                losses.append(loss.detach())
                if training:
                    self.zero.backward(loss)
                    if number < len(batch) - 1:
                        self.zero.step()  # counts the micro-batch
        return torch.stack(losses).mean() * self._reports

    @property
    def _sharded(self) -> bool:
        return self.recipe.parallel.zero_stage == 3

    def _gathered(self, parameter: nn.Parameter):
        """A context in which the whole parameter is there."""
        if not self._sharded:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter])

    def _clip_whole_gradients(self) -> float:
        """Clips in DeepSpeed's stead where it has no optimizer of its own around ours, to learn the
        norm from it."""
        from deepspeed.runtime.utils import clip_grad_norm_

        limit = self.recipe.optimizer.clip_grad or math.inf
        return float(clip_grad_norm_(self.model.parameters(), limit, mpu=ModelParallelUnit))


def _import_deepspeed(device: torch.device):
    """DeepSpeed, told which device is ours and to compile nothing."""
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # it takes this for the device
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    if device.type == "cpu":  # C++ for all-reduces within a machine
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        with fake_cuda.without_torch_compile():
            # DeepSpeed does so as it looks at the optimizer
            import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def _accepted_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings, which DeepSpeed has read once, before there is a model.

    Raises:
        ValueError: the recipe's file has what DeepSpeed refuses.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = deepspeed_settings(recipe)
    try:
        DeepSpeedConfig(copy.deepcopy(settings), ModelParallelUnit)
    except Exception as error:  # its own, those of its models, or of a comparison with a text
        if recipe.deepspeed is None:
            raise
        raise ValueError(f"{recipe.deepspeed} has what DeepSpeed does not take: "
                         f"{' '.join(str(error).split()):.500}; correct or remove it") from error
    return settings


def _sum_partial_gradients(model: nn.Module, tensor: int) -> None:
    """Sums the gradients of what all tensor-parallel ranks share and each sees a part of: under
    sequence parallelism a part of the tokens, in norms of queries and keys its own heads.
    Megatron-Core's own data parallelism does it, DeepSpeed knows nothing of it."""
    def reduced(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ps.get_tensor_model_parallel_group())
        return gradient

    for name, parameter in model.named_parameters():
        of_heads = tensor > 1 and any(f".{norm}." in name for norm in HEAD_NORMS)
        if of_heads or getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(reduced)
