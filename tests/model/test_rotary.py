"""Rotary frequencies of published models, which show in logits at thousands of positions only, are
those of transformers, within Llama 3.1's original length and beyond it."""

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_spdf.architecture.base import ARCHITECTURES


@pytest.mark.parametrize(("family", "preset"), [
    ("llama", "llama_2_7b"), ("llama", "llama_3_8b"), ("llama", "llama_3_1_8b"),
    ("llama", "llama_3_2_1b"), ("mistral", "mistral_7b_v0_3"), ("qwen2", "qwen2_5_0_5b"),
    ("qwen3", "qwen3_0_6b")])
def test_frequencies_are_those_of_transformers(family, preset):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = ARCHITECTURES.get(family)(preset=preset)
    given = model.gpt_model()
    ours = RotaryEmbedding(model.head_width, 1.0, use_cpu_initialization=True, **{
        key: given[key] for key in ("rotary_base", "rope_scaling", "rope_scaling_factor")})
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(model.huggingface,
                                                       **model.huggingface_config()))
    assert torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0.0)
    plain = model.rotary_base ** -(torch.arange(0, model.head_width, 2) / model.head_width)
    slowed = (plain / ours.inv_freq).max()
    assert slowed == pytest.approx(model.rotary_scaling, rel=1e-5)
