"""The training objective: cross entropy per token, smoothed if asked, and its mean over a batch."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_spdf.engine import MicroBatch
from megatron_spdf.model.attention import document_mask


def token_losses(model: nn.Module, micro: MicroBatch, smoothing: float, vocab_size: int) -> Tensor:
    """Cross entropy of every label, (B, T) float32; before the last pipeline stage, what the next stage takes.

    Args:
        smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
        vocab_size: without the rows that pad the embedding.
    """
    tokens, position, labels = micro.get("tokens"), micro.get("position_ids"), micro.get("labels")
    mask = document_mask(micro["documents"]) if "documents" in micro else None  # None: causal
    if smoothing == 0.0:
        return model(tokens, position, mask, labels=labels)
    return smoothed_cross_entropy(model(tokens, position, mask).float(), labels, smoothing, vocab_size)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, vocab_size: int) -> Tensor:
    """(1 - e) x cross entropy with the label + e x mean cross entropy over the vocabulary, z the logits:

        -log p_y + e (z_y - mean_v z_v)

    Args:
        logits: (B, T, rows of this tensor-parallel rank); changed in place.
        labels: (B, T).
    """
    first = ps.get_tensor_model_parallel_rank() * logits.size(-1)
    real = min(max(vocab_size - first, 0), logits.size(-1))
    mine = labels - first
    here = (mine >= 0) & (mine < logits.size(-1))
    flat, chosen = logits.flatten(0, 1), mine.where(here, 0).flatten()
    # Indexed and not gathered, which would keep the logits for backward, and the cross entropy overwrites them.
    z = flat[torch.arange(len(flat), device=flat.device), chosen].view_as(labels).where(here, 0.0)
    above_mean = z - logits[..., :real].sum(-1) / vocab_size
    above_mean = tensor_parallel.reduce_from_tensor_model_parallel_region(above_mean)
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels) + smoothing * above_mean


def mean_loss(micro: MicroBatch, losses: Tensor) -> Tensor:
    """Loss of a micro-batch whose mean over the micro-batches of all replicas is that of the global batch.

    `loss_tokens`, where a micro-batch has it, is the mean count of loss tokens over those micro-batches, so that
    every token counts alike however many its own micro-batch holds.
    """
    mask = micro["loss_mask"]
    return (losses.float() * mask).sum() / micro.get("loss_tokens", mask.sum())
