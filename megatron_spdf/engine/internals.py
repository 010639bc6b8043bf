"""What the package uses of its engines beyond their documented interface, and why.

A new release of PyTorch, Megatron-Core or DeepSpeed may take any of it away without a word. Here it
is in one table, to be tried before a pin is raised:

    python -m megatron_spdf.engine.internals    # what of it is missing; exit code 1 if anything is

Its test finds what is in the table and not used, and private names that are used and not in it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Internal:
    """Something of an engine that is private or undocumented, or is replaced or overridden.

    Attributes:
        owner: dotted name of a module, class or function.
        parts: of the owner: attributes, those of its instances too, arguments and keys; with `|`
            between the names of different releases. Without parts the owner itself is meant.
        why: it is used.
    """

    owner: str
    parts: tuple[str, ...]
    why: str

    @property
    def names(self) -> set[str]:
        """The last part of every name, by which users of it can be found."""
        parts = {name for part in self.parts for name in part.split("|")}
        return parts or {self.owner.rpartition(".")[2]}


INTERNALS = (
    # Replaced where there is no GPU.
    Internal("torch.cuda",
             ("current_device", "synchronize", "current_stream", "manual_seed", "get_rng_state",
              "set_rng_state"),
             "calls that Megatron-Core makes without asking for a GPU"),
    Internal("torch.Tensor", ("cuda", "type"),
             "Megatron-Core's optimizers look for CUDA's type names"),
    Internal("torch",
             ("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace",
              "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
              "randperm", "tensor", "zeros", "zeros_like"),
             "Megatron-Core makes tensors on `cuda`"),
    Internal("torch.Tensor",
             ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to"),
             "and may do so by a tensor that is there"),
    Internal("torch.jit._builtins", ("_find_builtin", "_register_builtin"),
             "scripts may call functions that are replaced"),
    Internal("torch.nn.Module", ("cuda",), "Megatron-Core moves models to the GPU"),
    Internal("torch.nn.Module", ("_apply",), "a mask is indexed anew on another device"),
    Internal("torch.nn.parallel.DistributedDataParallel",
             ("_set_params_and_buffers_to_ignore_for_model", "_ddp_params_and_buffers_to_ignore"),
             "masks are the same on all ranks and need no broadcast"),
    Internal("torch.compile", (),
             "left out while engines are imported: a third of the time that a rank takes to start"),
    Internal("megatron.core.tensor_parallel.random", ("_get_cuda_rng_state", "_set_cuda_rng_state"),
             "the random state of a GPU becomes the CPU's"),
    Internal("torch.testing._internal.distributed.fake_pg.FakeStore", (),
             "groups of any size without other ranks, for a dry run"),

    # Wrapped, timed or counted: what ranks say to each other.
    Internal("torch.distributed.distributed_c10d",
             ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce",
              "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "gather_object",
              "recv", "reduce", "reduce_scatter_tensor", "send", "_all_gather_base",
              "_reduce_scatter_base"),
             "notes the last collective and how long ranks wait in them"),
    Internal("torch.distributed.Work", ("wait",), "notes how long ranks wait for collectives"),
    Internal("torch.utils._python_dispatch.TorchDispatchMode", (), "sees every c10d operation"),
    Internal("torch.utils._pytree.tree_flatten", (),
             "finds the tensors in an operation's arguments"),
    Internal("torch._ops.OpOverload", ("_schema",), "the name of an operation"),
    Internal("torch.distributed.ProcessGroup", ("unbox", "group_desc"),
             "whom an operation is sent to"),
    Internal("megatron.core.pipeline_parallel.schedules", ("forward_step", "backward_step"),
             "timed by the benchmark of a step's parts"),

    # Megatron-Core's model.
    Internal("megatron.core.models.gpt.gpt_model.GPTModel",
             ("_postprocess", "hidden_states", "labels", "loss_mask",
              "shared_embedding_or_output_weight"),
             "the head's loss a few tokens at a time; 0.19 has `output_processor` for this"),
    Internal("megatron.core.transformer.attention.SelfAttentionSubmodules", ("core_attention",),
             "attention by PyTorch's kernels"),
    Internal("megatron.core.extensions.transformer_engine", ("HAVE_TE", "TEDotProductAttention"),
             "attention by Transformer Engine"),
    Internal("megatron.core.fusions.fused_layer_norm.FusedLayerNorm", (), "norms by Apex"),
    Internal("megatron.core.transformer.mlp.MLP",
             ("linear_fc1", "linear_fc2", "activation_func", "sharded_state_dict"),
             "gates and ups slice by slice: the class of a built MLP is replaced"),
    Internal("megatron.core.fusions.fused_bias_swiglu.bias_swiglu_impl", ("input", "bias"),
             "SwiGLU as one function, which keeps its input alone"),
    Internal("megatron.core.transformer.transformer_layer.TransformerLayerSubmodules",
             ("input_layernorm", "pre_mlp_layernorm"), "norms that know sequence parallelism"),
    Internal("megatron.core.transformer.transformer_block.TransformerBlockSubmodules",
             ("layer_specs", "layer_norm"), "the same norm after the last block"),
    Internal("megatron.core.transformer.transformer_block.get_num_layers_to_build", ("vp_stage",),
             "layers of an interleaved stage"),
    Internal("megatron.core.tensor_parallel.layers.ColumnParallelLinear",
             ("_forward_impl", "tp_group"), "multiplies with the values of a compact weight"),
    Internal("megatron.core.tensor_parallel.layers.RowParallelLinear",
             ("_forward_impl", "tp_group"), "the same"),
    Internal("megatron.core.tensor_parallel.layers."
             "linear_with_grad_accumulation_and_async_allreduce",
             ("input", "weight", "bias", "allreduce_dgrad", "sequence_parallel", "tp_group"),
             "the arguments that a layer's product is called with"),
    Internal("megatron.core.tensor_parallel.layers",
             ("dist_all_gather_func", "dist_reduce_scatter_func"),
             "the collectives of Megatron-Core's own product, which the benchmark times"),
    Internal("megatron.core.parallel_state.get_global_memory_buffer", (),
             "one buffer for all gathers of a sequence"),
    Internal("megatron.core.tensor_parallel.layers.set_tensor_model_parallel_attributes",
             ("tensor_model_parallel", "partition_dim", "partition_stride"),
             "marks shards, which Megatron-Core does only where it draws their values"),
    Internal("megatron.core.tensor_parallel.layers.param_is_not_tensor_parallel_duplicate", (),
             "asks whether a shard counts in the gradient's norm"),
    Internal("megatron.core.transformer.utils.make_sharded_tensors_for_checkpoint",
             ("tp_group", "dp_cp_group"), "a compact layer's place in a checkpoint"),
    Internal("megatron.core.transformer.transformer_block.TransformerBlock",
             ("non_homogeneous_layers",),
             "a key for every layer, since compact weights have different lengths"),

    # Megatron-Core's data parallelism and optimizers.
    Internal("megatron.core.distributed.DistributedDataParallel",
             ("disable_bucketing", "zero_grad_buffer", "start_param_sync", "force_sync",
              "grad_added_to_main_grad"),
             "interleaved chunks, overlapped gathers, gradients added in place"),
    Internal("megatron.core.distributed.finalize_model_grads", ("sequence_parallel",),
             "the mark of parameters whose gradients are summed over the tensor-parallel group"),
    Internal("megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer",
             ("buckets", "param_index_map", "grad_data", "main_grad"),
             "where parameters and gradients lie"),
    Internal("megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucket",
             ("params", "params_list", "offset", "grad_data"), "what is gathered at once"),
    Internal("megatron.core.optimizer.MegatronOptimizer",
             ("prepare_grads", "step_with_ready_grads", "get_parameters",
              "get_grad_stats_parallel_group",
              "get_grads_for_grad_norm|get_main_grads_for_grad_norm"),
             "a step in parts, with one wait of the host"),
    Internal("megatron.core.model_parallel_config.ModelParallelConfig",
             ("finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func"),
             "set on a configuration, where a name that nobody reads would go unnoticed"),
    Internal("megatron.core.optimizer.ChainedOptimizer", ("chained_optimizers",),
             "the one that has state; PyTorch's in it may be replaced"),
    Internal("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
             ("_get_model_param_range_map", "model_param_gbuf_map", "model_param_group_index_map",
              "gbuf_local", "data_parallel_group", "buffers"),
             "which part of a parameter's state this rank has"),
    Internal("megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params", ("main_param",),
             "the master weight of a bf16 parameter"),
    Internal("megatron.core.optimizer.optimizer_config", ("ParamKey", "ParamPredicate"),
             "learning rates of a parametrization"),
    Internal("megatron.core.optimizer_param_scheduler.OptimizerParamScheduler",
             ("num_steps", "get_lr"), "tokens as the schedule's unit"),
    Internal("torch.optim.Adam", ("exp_avg", "exp_avg_sq", "fused"), "Adam's state by name"),
    Internal("torch._foreach_mul_", (), "clips all gradients at once"),

    # Checkpoints and data.
    Internal("megatron.core.dist_checkpointing.mapping.ShardedTensor",
             ("key", "data", "replica_id", "local_shape", "without_data", "global_slice",
              "global_shape", "global_offset"),
             "what a rank saves for the others, and how a compact weight is called in the file"),
    Internal("megatron.core.dist_checkpointing.optimizer.make_sharded_optimizer_tensor", (),
             "optimizer state shaped like its parameter"),
    Internal("megatron.core.dist_checkpointing.core", ("save_config", "CheckpointingConfig"),
             "what the loader asks for beside the tensors"),
    Internal("megatron.core.dist_checkpointing.state_dict_utils.save_preprocess", (),
             "saving in a thread"),
    Internal("megatron.core.dist_checkpointing.strategies.torch",
             ("MCoreSavePlanner", "_replace_state_dict_keys_with_sharded_keys",
              "mcore_to_pyt_state_dict"),
             "saving in a thread, without processes and a queue server"),
    Internal("torch.distributed.checkpoint.filesystem._StorageInfo", (),
             "writes a checkpoint's index"),
    Internal("torch.distributed.checkpoint.FileSystemWriter", ("finish",),
             "writes a checkpoint's index"),
    Internal("torch.distributed.checkpoint.metadata",
             ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
              "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
             "the classes that an index may hold, and no other"),
    Internal("torch.serialization", ("_get_layout",), "the same"),
    Internal("megatron.core.datasets.gpt_dataset.GPTDataset",
             ("_build_document_sample_shuffle_indices", "_query_document_sample_shuffle_indices"),
             "an order of samples of our own"),
    Internal("megatron.core.datasets.helpers", ("build_sample_idx", "build_blending_indices"),
             "Megatron-Core's order of samples, built once"),

    # Sparse tensor cores.
    Internal("torch", ("_cslt_compress", "_cslt_sparse_mm", "_sparse_semi_structured_mm"),
             "products with 2:4 weights, without a subclass of Tensor"),
    Internal("torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass",
             (), "where CUTLASS wants the active entries named"),

    # DeepSpeed.
    Internal("deepspeed.comm.torch", ("build_shm_op",),
             "replaced on CPU, where it would compile C++"),
    Internal("deepspeed.comm.comm", ("cdb",), "the backend whose collectives a benchmark times"),
    Internal("deepspeed.comm.torch.TorchBackend",
             ("all_gather_function", "reduce_scatter_function"),
             "timed by the benchmark of a step's parts"),
    Internal("deepspeed.runtime.zero.muon.muon_optimizer", (),
             "imported while torch.compile is left out"),
    Internal("deepspeed.runtime.zero.parameter_offload", ("FWD_MODULE_STACK",),
             "emptied, since a second ZeRO-3 engine would meet the first one's modules"),
    Internal("deepspeed.runtime.utils.clip_grad_norm_", ("mpu",),
             "the norm where DeepSpeed tells none"),
    Internal("deepspeed.runtime.engine.DeepSpeedEngine", ("get_global_grad_norm", "destroy"),
             "the norm; room for another engine"),
    Internal("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
             ("single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state",
              "update_lp_params", "overflow"),
             "master weights of ZeRO 1 and 2"),
    Internal("deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
             ("fp32_groups_flat_partition", "_lazy_init_hp_params_optimizer_state",
              "update_lp_params"),
             "master weights under bf16"),
    Internal("deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer",
             ("fp16_groups", "fp32_groups"), "master weights of bf16 without ZeRO"),
    Internal("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
             ("fp32_partitioned_groups_flat", "fp16_groups", "persistent_parameters",
              "_reassign_or_swap_out_partitioned_parameters"),
             "master weights of ZeRO 3"),
    Internal("deepspeed.runtime.zero.partition_parameters.Init",
             ("ds_id", "ds_tensor", "ds_process_group", "all_gather", "partition"),
             "a parameter's part under ZeRO 3"),
)


def missing() -> list[str]:
    """A line for everything in the table that the installed releases lack."""
    return [f"{name}, for: {internal.why}"
            for internal in INTERNALS for name in missing_of(internal)]


def missing_of(internal: Internal) -> list[str]:
    """What an entry names and the installed releases lack."""
    try:
        owner = _find(internal.owner)
    except (ImportError, AttributeError) as error:
        return [f"{internal.owner} ({error})"]
    return [f"{internal.owner}: {part}" for part in internal.parts
            if not any(_has(owner, name) for name in part.split("|"))]


def _find(name: str) -> Any:
    """A module by its dotted name, or what is in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        place, _, last = name.rpartition(".")
        if not place:
            raise
        return getattr(_find(place), last)


def _has(owner: Any, name: str) -> bool:
    """True if it has such an attribute, or its code names such an attribute, argument or key."""
    if hasattr(owner, name):
        return True
    written = inspect.getmro(owner) if inspect.isclass(owner) else (owner,)
    return any(name in _words(thing) for thing in written)


@cache
def _words(thing: Any) -> set[str]:
    """Names and whole strings in the code of a module, class or function, if it is Python's."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError):
        return set()
    fields = (getattr(node, field, None) for node in ast.walk(code)
              for field in ("id", "attr", "arg", "name", "value"))
    return {word for word in fields if isinstance(word, str)}


def main() -> int:
    from megatron_spdf.parallel import fake_cuda

    fake_cuda.install()  # before anything that imports megatron.core
    lines = missing()
    print("\n".join(lines) or f"all of {len(INTERNALS)} entries are there")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
