"""An independent reader and writer: Megatron-Core's GPTModel with its own layers, as Megatron-LM
builds, saves and loads it, without our model."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import parallel_state as ps
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu


def load_and_save(directory: str, saved: str, shape: dict,
                  ids: torch.Tensor) -> torch.Tensor | None:
    """The logits of a GPTModel at tensor 2 x pipeline 2 that has loaded the release in `directory`,
    on the last stage; then saves it as iteration 5 in `saved`.

    Args:
        shape: layers, hidden, ffn_hidden, heads, rows (of the embedding), max_positions.
    """
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD_SIZE"]))
    ps.initialize_model_parallel(2, 2, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build(shape)
    state = sharded(model)
    loaded = dist_checkpointing.load(state, f"{directory}/release")
    assert loaded["checkpoint_version"] == 3.0
    model.load_state_dict(loaded["model"])
    found = logits([model.eval()], ids)
    place = Path(saved) / "iter_0000005"
    if dist.get_rank() == 0:
        place.mkdir(parents=True)
        (place.parent / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    state = sharded(model) | {"checkpoint_version": 3.0, "iteration": 5}
    dist_checkpointing.save(state, str(place), content_metadata={"singleton_local_shards": False})
    ps.destroy_model_parallel()
    dist.destroy_process_group()
    return found


def build(shape: dict) -> GPTModel:
    config = TransformerConfig(
        num_layers=shape["layers"], hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn_hidden"], num_attention_heads=shape["heads"],
        activation_func=partial(gelu, approximate="tanh"),
        hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, use_cpu_initialization=True)
    return GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=shape["rows"],
        max_sequence_length=shape["max_positions"], pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(), share_embeddings_and_output_weights=True,
        position_embedding_type="learned_absolute")


def sharded(model: GPTModel) -> dict:
    """What Megatron-LM's training puts into a checkpoint of the weights."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True,
                "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    return {"model": model.sharded_state_dict(metadata=metadata)}


@torch.no_grad()
def logits(chunks: list, ids: torch.Tensor) -> torch.Tensor | None:
    """(B, T, rows of the embedding) of a model on all ranks, on the last pipeline stage; None
    elsewhere."""
    def forward_step(iterator, model):
        tokens = next(iterator)
        return model(tokens, torch.arange(tokens.size(1)).expand_as(tokens),
                     None), lambda out, non_loss_data: out

    # as interleaving wants them
    count, interleaved = ps.get_pipeline_model_parallel_world_size(), len(chunks) > 1
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter([ids] * count) for _ in chunks] if interleaved else iter([ids] * count),
        model=chunks if interleaved else chunks[0], num_microbatches=count, seq_length=ids.size(1),
        micro_batch_size=ids.size(0), forward_only=True, collect_non_loss_data=True)
    if not ps.is_pipeline_last_stage():
        return None
    return tensor_parallel.gather_from_tensor_model_parallel_region(found[0])
