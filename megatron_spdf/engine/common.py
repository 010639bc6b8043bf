"""What both engines do alike: the learning rate, dropout's seed, the agreement of all ranks on a
step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_spdf.engine.base import Engine
from megatron_spdf.kernels import dispatch
from megatron_spdf.kernels.softmax import describe_softmax
from megatron_spdf.layers.compact import compact_of, sparse_modules
from megatron_spdf.layers.products.base import product_of
from megatron_spdf.model.attention import SdpaCoreAttention
from megatron_spdf.model.batch import MicroBatch
from megatron_spdf.model.objective import Composite
from megatron_spdf.model.parametrization import Peak
from megatron_spdf.random_streams import stream_key
from megatron_spdf.recipe.recipe import Recipe


class Scheduler(OptimizerParamScheduler):
    """Megatron-Core's schedule, whose WSD leaves the peak by a rounding error before it decays."""

    def get_lr(self, param_group: dict) -> float:
        if (self.lr_decay_style == "WSD" and self.lr_warmup_steps <= self.num_steps
                <= self.lr_decay_steps - self.wsd_decay_steps):
            return param_group.get("max_lr", self.max_lr)
        return super().get_lr(param_group)


def make_scheduler(recipe: Recipe, optimizer) -> OptimizerParamScheduler:
    """The recipe's schedule with tokens as its unit."""
    o = recipe.optimizer
    # Megatron-Core has the other shapes, and a stretch at the peak, in its WSD only.
    wsd = o.decay not in ("cosine", "linear", "constant") or o.decay_share < 1.0
    return Scheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.lr * o.min_lr_ratio,
        lr_warmup_steps=o.warmup_tokens,
        lr_decay_steps=recipe.steps * recipe.tokens_per_step,
        lr_decay_style="WSD" if wsd else o.decay,
        wsd_decay_steps=recipe.decay_tokens if wsd else None,
        lr_wsd_decay_style=o.decay if wsd else None,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def set_learning_rate(scheduler: OptimizerParamScheduler, tokens: int) -> None:
    """Sets every parameter group's learning rate to that of the point where `tokens` are
    consumed."""
    scheduler.num_steps = tokens  # its steps are our tokens
    scheduler.step(increment=0)


def other_peaks(recipe: Recipe, models: Sequence[nn.Module]) -> list[Peak]:
    """The learning rates other than `optimizer.lr` that parameters of any rank have: all ranks
    need the same groups."""
    found: list[set[Peak]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, {p.peak for m in models for p in m.parameters()})
    return sorted(set.union(*found) - {Peak(recipe.optimizer.lr)})


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer as PyTorch has it, with weight decay on what has two axes, as
    Megatron-Core's decay."""
    o = recipe.optimizer
    groups = [{"params": [p for p in model.parameters()
                          if (p.ndim > 1 and not own_decay(p)) == decays and p.peak == peak],
               "wd_mult": float(decays), **peak.limits(o.min_lr_ratio)}
              for peak in [Peak(o.lr), *other_peaks(recipe, [model])] for decays in (True, False)]
    return o.build([group for group in groups if group["params"]])


def start_state(recipe: Recipe, optimizer: torch.optim.Optimizer,
                masters: Sequence[Tensor]) -> None:
    """Gives fp32 masters the named state that they have before the first update."""
    recipe.optimizer.start(optimizer, masters)
    if recipe.newborn:
        recipe.newborn.start(optimizer, masters)


def correct_newborn(engine: Engine) -> None:
    """Has updates of an engine's optimizer treat what is born as the recipe says."""
    if engine.recipe.newborn:
        engine.recipe.newborn.attach(engine.torch_optimizer, lambda: engine.optimizer_steps)


def own_decay(parameter: nn.Parameter) -> bool:
    """True if the mask algorithm decays a parameter in its own way, in place of the optimizer."""
    return parameter.own_decay


def learns_at(peak: Peak, parameter: nn.Parameter) -> bool:
    return parameter.peak == peak


def learning_rate(scheduler: OptimizerParamScheduler) -> float:
    return scheduler.get_lr({"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr})


def seed_dropout(recipe: Recipe, number: int) -> None:
    """Dropout of a step depends on (seed, step, data and pipeline rank), so nothing needs saving
    for it."""
    if recipe.model.dropout > 0.0:
        place = (
            ps.get_data_parallel_rank() * recipe.parallel.pipeline
            + ps.get_pipeline_model_parallel_rank()
        )
        seed = int(stream_key("dropout", recipe.seed, number, place)[0] % 2**31)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def agree(loss: Tensor, replicas: int, stop: bool, *others: Tensor, parts: Sequence[Tensor] = (),
          meanwhile: Callable[[Tensor], None] | None = None,
          ) -> tuple[float, bool, *tuple[float, ...]]:
    """The loss of the global batch and whether any rank wants to stop, on every rank, in one small
    reduction; and other numbers of this rank, (). All in one transfer, for which the host waits
    until the device has done its work up to here.

    Args:
        loss: of this replica on the one rank that reports for it, zero on its others.
        replicas: number of data-parallel replicas.
        others: come back as they are.
        parts: of the loss, like it; what comes back of them stands before the others.
        meanwhile: is called before the host waits, with all that comes back as it is on the device,
            (2 + parts + others,); what it launches keeps the device at work meanwhile.
    """
    # Every rank adds what it has: the mean over replicas and the number of ranks that want to stop
    # come out of one sum, so that no rank can leave a step that others stay in.
    shared = torch.stack([loss.float() / replicas,
                          torch.full_like(loss, float(stop), dtype=torch.float32),
                          *(part.float() / replicas for part in parts)])
    dist.all_reduce(shared)
    agreed = torch.cat([shared, *(n.view(1) for n in others)])
    if meanwhile is not None:
        agreed = _on_host_after(agreed, meanwhile)
    loss_mean, stops, *numbers = agreed.tolist()
    return loss_mean, stops > 0, *numbers


def _on_host_after(agreed: Tensor, meanwhile: Callable[[Tensor], None]) -> Tensor:
    """The numbers on the host, which does not wait for what `meanwhile` launches."""
    on_host = agreed.to("cpu", non_blocking=True)
    there = torch.cuda.current_stream().record_event() if agreed.is_cuda else None
    meanwhile(agreed)
    if there:
        there.synchronize()
    return on_host


def parts_of(model: nn.Module) -> dict[str, Tensor]:
    """The parts of a model's loss in the step that was just run, (), by name; where it has none,
    nothing."""
    objective = model.objective
    if not isinstance(objective, Composite):
        return {}
    return dict(zip(objective.parts, objective.take(), strict=True))


def bytes_beside(model: nn.Module) -> dict[str, int]:
    """Bytes of weights that a model's loss needs beside its own, on this rank; where it needs none,
    nothing."""
    objective = model.objective
    return {"teacher": objective.held} if isinstance(objective, Composite) else {}


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    return {k: v.to(device, non_blocking=True) for k, v in micro.items()}


def model_metadata() -> dict[str, object]:
    """What the model's `sharded_state_dict` is to know."""
    # compact weights of different lengths: a key for every layer
    return {"non_homogeneous_layers": True,
            "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}


def release(engine, models: Sequence[nn.Module], *others) -> None:
    """Empties an engine's parts, so that their memory and process groups are freed: autograd's
    hooks hold the model in circles that Python's collector cannot see."""
    # their dictionaries hold hooks and buffers, through which the circles run
    held = [part for model in models for part in (*model.parameters(), *model.modules())]
    for thing in (*held, *others, engine):
        vars(thing).clear()
    del held, models, others
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tensors_only(state: dict) -> dict:
    """Drops the `_extra_state` objects, which are empty and would be pickled into the
    checkpoint."""
    return {k: v for k, v in state.items() if not k.endswith("_extra_state")}


def masters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The fp32 tensors that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def implementation_summary(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer,
                           device: torch.device) -> str:
    """Implementations that compute the parts of a step, for the log."""
    layer = model.decoder.layers[0]
    attention = layer.self_attention.core_attention
    parts = {"attention": type(attention), "norm": type(layer.pre_mlp_layernorm),
             "optimizer": type(optimizer)}
    names = {part: f"{part} {kind.__module__.split('.')[0]}.{kind.__name__}" for part,
             kind in parts.items()}
    if device.type == "cuda" and isinstance(attention, SdpaCoreAttention):
        names["attention"] += f" on {attention.describe(masked=recipe.data.reset_attention)}"
    if any(group.get("fused") for group in optimizer.param_groups):
        names["optimizer"] += " fused"
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else "CPU (gloo, stand-in for CUDA)"
    )
    pointwise = "compiled" if model.config.bias_dropout_fusion else "one by one"
    launched = "; forward and backward one CUDA graph" if recipe.kernels.cuda_graph else ""
    loss = describe_softmax(device.type, model.config.params_dtype)
    return (f"device {where}{launched}; {', '.join(names.values())}; bias, activation and dropout "
            f"{pointwise}; loss {loss}; expand/compress {dispatch.backend_name(device.type)}"
            f"{_describe_patterns(model, device)}")


def _describe_patterns(model: nn.Module, device: torch.device) -> str:
    """Products of weights whose patterns have one of their own."""
    patterns = {compact_of(m).planned.pattern for m in sparse_modules(model)}
    said = [f"; {own.title} {own.describe(pattern, device.type, model.config.params_dtype)}"
            for pattern in patterns if (own := product_of(pattern))]
    return "".join(sorted(said))
