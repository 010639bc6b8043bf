"""The training objective: mean cross entropy over the tokens of a global batch."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_spdf.model.attention import document_mask
from megatron_spdf.model.batch import MicroBatch


def batch_loss(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Loss of a micro-batch, (), whose mean over the micro-batches of all replicas is that of the
    global batch; before the last pipeline stage, what the next stage takes.

    `loss_tokens`, where a micro-batch has it, is the mean count of loss tokens over those
    micro-batches, so that every token counts alike however many its own micro-batch holds.
    """
    mask = document_mask(micro["documents"]) if "documents" in micro else None  # None: causal
    weights = None
    if "loss_mask" in micro:
        weights = micro["loss_mask"] / micro.get("loss_tokens", micro["loss_mask"].sum())
    return model(micro.get("tokens"), micro.get("position_ids"), mask, labels=micro.get("labels"),
                 loss_mask=weights)
