"""Builds this rank's part of a decoder from Megatron-Core, sparse where the plan says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_spdf.architecture.base import Model
from megatron_spdf.layers.megatron import sparsify_layer
from megatron_spdf.model.attention import QkvLinear, core_attention
from megatron_spdf.model.init import DrawnWeights, InitialWeights, initialize, owned_weights
from megatron_spdf.model.mlp import GatedMlp
from megatron_spdf.model.norm import norm_class, residual_norm_class
from megatron_spdf.model.objective import HeadInputs, Objective, cross_entropy
from megatron_spdf.model.parametrization import Parametrization
from megatron_spdf.recipe.recipe import AUTO, Recipe
from megatron_spdf.sparsity.plan import Plan
from megatron_spdf.text import first_line

logger = logging.getLogger(__name__)


def transformer_config(recipe: Recipe, rules: Parametrization) -> TransformerConfig:
    """Megatron-Core's configuration of the recipe's model and layout."""
    m, p = recipe.model, recipe.parallel
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    fuses = _compiles()
    recompute: dict[str, object] = {}
    if recipe.train.recompute != "none":
        recompute["recompute_granularity"] = recipe.train.recompute
    if recipe.train.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        **m.transformer_config(),
        activation_func=_activation(m, fuses),
        softmax_scale=rules.attention_scale,
        perform_initialization=False,  # model/init.py fills the weights, the same at every layout
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=recipe.train.precision == "bf16",
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.interleave if p.interleave > 1 else None,
        sequence_parallel=p.sequence,
        # Interleaved stages: batched sends forward and backward between two ranks are matched in
        # the wrong order and give wrong gradients without an error.
        overlap_p2p_comm=p.interleave > 1,
        batch_p2p_comm=p.interleave == 1,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=_fuses_activation(m, fuses),
        bias_dropout_fusion=fuses,
        masked_softmax_fusion=False,
        **recompute,
    )


def _activation(model: Model, fuses: bool) -> Callable[[Tensor], Tensor]:
    """The activation function of the feed-forward layer."""
    if model.activation == "gelu" and not fuses:  # the fused one is its tanh approximation
        return partial(F.gelu, approximate="tanh")
    return getattr(F, model.activation)


def _fuses_activation(model: Model, compiles: bool) -> bool:
    """True if Megatron-Core has the activation and what is beside it as one function: SwiGLU, which
    saves memory without a compiler too, and GELU with a bias."""
    if model.gated:
        return model.activation == "silu" and (compiles or not torch.cuda.is_available())
    return compiles and model.activation == "gelu" and model.biases


@cache
def _compiles() -> bool:
    """True if Megatron-Core's fusions of pointwise operations, which go through torch.compile, can
    be had: tried out once, since that takes Triton, a C compiler, and a GPU and driver that Triton
    knows."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.compile(F.gelu)(torch.zeros(8, device="cuda", requires_grad=True)).sum().backward()
    except Exception as error:  # whatever a compiler, a driver or a GPU it does not know may raise
        logger.warning("bias, activation and dropout run one by one, since torch.compile does not "
                       f"work here ({type(error).__name__}: {first_line(error)})")
        return False
    return True


class Decoder(GPTModel):
    """Megatron-Core's decoder, whose loss is that of `head.py`, (), where tokens have weights,
    `loss_mask` (B, T), beside their labels, or that of another `objective`. Labels are smoothed in
    training mode only."""

    def __init__(self, rules: Parametrization, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.rules = rules
        self.objective: Objective = cross_entropy

    @property
    def head_weight(self) -> Tensor:
        """(rows, H), this rank's rows of the LM head, on the last pipeline stage."""
        if self.rules.recipe.model.tied:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None,
                     loss_mask: Tensor | None = None,
                     **others) -> Tensor:
        if loss_mask is None or not self.post_process:
            return super()._postprocess(hidden_states, labels=labels, loss_mask=loss_mask, **others)
        shared = (tensor_parallel.gather_from_sequence_parallel_region
                  if self.config.sequence_parallel else
                  tensor_parallel.copy_to_tensor_model_parallel_region)
        x, recipe = shared(hidden_states), self.rules.recipe
        if self.rules.head_input != 1.0:
            x = x * self.rules.head_input
        read = tuple(others[key] for key in ("input_ids", "position_ids", "attention_mask"))
        return self.objective(HeadInputs(
            x, self.head_weight, labels, loss_mask, recipe.model.vocab_size,
            recipe.train.label_smoothing if self.training else 0.0, read, self.training))


def build_model(recipe: Recipe, plan: Plan,
                source: InitialWeights | None = None) -> list[nn.Module]:
    """This rank's model chunks (one, or `parallel.interleave`), made sparse and filled from
    `source`, on the device.

    Without a source the weights are drawn anew.
    """
    rules = Parametrization(recipe, plan)
    config = transformer_config(recipe, rules)
    source = source or DrawnWeights(recipe.seed, recipe.model.slices)
    interleaved = recipe.parallel.interleave > 1
    return [_build_chunk(recipe, config, rules, source, stage if interleaved else None)
            for stage in range(recipe.parallel.interleave)]


def _build_chunk(
    recipe: Recipe, config: TransformerConfig, rules: Parametrization, source: InitialWeights,
    stage: int | None
) -> Decoder:
    layer = get_gpt_layer_local_spec(qk_layernorm=recipe.model.qk_norm)
    norm = norm_class(recipe.kernels.norm, recipe.model.norm)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = core_attention(recipe.kernels.attention)
    attention.linear_qkv = QkvLinear
    if recipe.model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    of_branches = residual_norm_class(norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = of_branches
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=stage), layer_norm=norm)
    model = Decoder(
        rules,
        config,
        block,
        **recipe.model.gpt_model(),
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        vp_stage=stage,
    )
    if recipe.model.gated:
        for layer in model.decoder.layers:
            GatedMlp.convert(layer.mlp, recipe.model.slices // recipe.parallel.tensor)
    model.cuda(torch.cuda.current_device())
    if config.bf16:
        model.bfloat16()
    _fill(model, rules, source)
    if rules.embedding_output != 1.0 and model.pre_process:
        model.embedding.register_forward_hook(lambda _, __, output: output * rules.embedding_output)
    if rules.head_input != 1.0 and model.post_process:
        model.output_layer.register_forward_pre_hook(
            lambda _, inputs: (inputs[0] * rules.head_input, *inputs[1:])
        )
    if model.post_process:
        model.output_layer.register_forward_hook(partial(_hide_padding, recipe.model.vocab_size))
    return model


def _hide_padding(vocab_size: int, layer: nn.Module, _,
                  output: tuple[Tensor, Tensor | None]) -> None:
    """Rows that pad the embedding take no part in any softmax: their logits (T, B, V / TP) are
    -inf.

    Megatron-Core lets them compete, so that its loss depends on the padding and differs from the
    exported model's. Done outside of autograd, which would copy the gradient of all logits; that of
    -inf is zero after a softmax.
    """
    logits = output[0].detach()  # the same storage
    first = ps.get_tensor_model_parallel_rank() * logits.size(-1)
    logits[..., max(vocab_size - first, 0) :] = -torch.inf


def _fill(model: GPTModel, rules: Parametrization, source: InitialWeights) -> None:
    """Sparsifies and initializes module by module, so that one weight at a time is dense in
    float32."""
    rank, world = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
    weights, plan = {w.name: rules.initial(w)
                     for w in rules.recipe.model.weights()}, rules.plan
    # ZeRO-3 gathers a parameter for the expansion alone, and frees it before a product could use
    # it.
    dense_copy = (
        "always" if rules.recipe.parallel.zero_stage == 3 else rules.recipe.sparsity.dense_copy
    )
    # what does not train has settled none
    auto = rules.recipe.train.micro_batch == AUTO
    micro_batches = 1 if auto else rules.recipe.micro_batches
    for name, module in canonical_modules(model):
        if f"{name}.weight" in plan.weights:
            sparsify_layer(module, plan.weights[f"{name}.weight"], plan.seed, rank, world,
                           dense_copy, micro_batches)
        initialize(module, name, weights, source, rank, world)
        for parameter, weight in owned_weights(module, name, weights):
            # both for the optimizer's groups
            parameter.peak = rules.peak(weight)
            planned = plan.weights.get(weight.name)
            parameter.own_decay = planned is not None and planned.algorithm.replaces_decay


def canonical_modules(model: GPTModel) -> list[tuple[str, nn.Module]]:
    """Modules of a chunk by their name in the whole model: layers counted from 0 over all
    stages."""
    named = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        if "parametrizations" not in parts:
            named.append((".".join(parts), module))
    return named

