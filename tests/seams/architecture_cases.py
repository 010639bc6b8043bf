"""What runs on the ranks of test_architecture.py."""

from __future__ import annotations

import cases
import torch

from megatron_spdf.layers.compact import expanded


def kept_by_layer(recipe: dict) -> int:
    """Bytes of what a layer keeps of a micro-batch for backward, weights and tables left out."""
    with cases.bench(recipe) as b, expanded(b.engine.models[0]):
        model, train = b.engine.models[0], b.recipe.train
        layer, kept = model.decoder.layers[0], {}
        angles = model.rotary_pos_emb(train.sequence_length)
        held = [angles, *(m.weight for m in layer.modules()
                          if isinstance(getattr(m, "weight", None), torch.Tensor))]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(train.sequence_length, train.micro_batch, b.recipe.model.hidden,
                        requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, attention_mask=None, rotary_pos_emb=angles)
        for tensor in held:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
