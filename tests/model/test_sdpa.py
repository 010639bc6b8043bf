"""Attention against float64, and that no kernel is left to chance on a GPU."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from megatron_spdf.model import attention, sdpa
from megatron_spdf.model.attention import SdpaCoreAttention
from megatron_spdf.model.sdpa import (
    FUSED,
    Heads,
    attend,
    choose_kernels,
    describe_kernels,
    kernels_on_gpu,
)

GPT2 = Heads(queries=12, groups=12, width=64, dtype=torch.bfloat16, dropout=0.0, masked=False)
ODD = replace(GPT2, queries=6, groups=2, width=100, masked=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_float64(groups, masked):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=draw) for heads in (4, groups, groups))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
    if masked:
        allowed[1, :, 5:, :5] = False  # two documents
    scores = (q.double() @ k.double().repeat_interleave(4 // groups, 1).mT) / math.sqrt(8)
    expected = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v.double().repeat_interleave(
        4 // groups, 1
    )
    found = attend(q, k, v, allowed if masked else None)
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("heads", [GPT2, ODD])
def test_math_is_no_choice_where_a_fused_kernel_runs(heads):
    kernels = choose_kernels(heads, lambda kernels, heads: True)
    assert kernels and SDPBackend.MATH not in kernels
    assert set(kernels) <= set(FUSED)
    assert describe_kernels(kernels, heads) in ("flash or cudnn or efficient", "efficient")


def test_flash_is_not_asked_for_with_a_mask():
    asked = []
    choose_kernels(ODD, lambda kernels, heads: asked.append((tuple(kernels), heads)) or True)
    assert asked == [((SDPBackend.EFFICIENT_ATTENTION,), ODD)]


def test_what_no_fused_kernel_takes_runs_all_the_same_and_is_said():
    kernels = choose_kernels(ODD, lambda kernels, heads: False)
    assert SDPBackend.MATH in kernels
    said = describe_kernels(kernels, ODD)
    assert said.startswith("PyTorch's operations one by one")
    assert said.endswith("no fused kernel here takes 6 heads of 100 in 2 groups in bfloat16 and a "
                         "mask")


def test_what_runs_on_a_gpu_is_tried_out_once_for_heads_of_a_kind(monkeypatch):
    tried = []
    monkeypatch.setattr(sdpa, "_runs_on_gpu", lambda kernels, heads: tried.append(heads) or True)
    kernels_on_gpu.cache_clear()
    for heads in (GPT2, replace(ODD), replace(GPT2), ODD):
        assert kernels_on_gpu(heads) == choose_kernels(heads, lambda kernels, heads: True)
    kernels_on_gpu.cache_clear()
    assert tried == [GPT2, ODD]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("ranks", "queries", "groups"), [(1, 8, 4), (2, 4, 2), (4, 2, 1),
                                                          (8, 1, 1)])
def test_kernels_are_chosen_and_said_of_a_ranks_own_heads(monkeypatch, ranks, queries, groups,
                                                          masked, training):
    """The same in training and in evaluation. With more ranks than groups each has one."""
    config = SimpleNamespace(num_attention_heads=8, num_query_groups=4, kv_channels=16,
                             params_dtype=torch.bfloat16, tensor_model_parallel_size=ranks)
    said, chosen = [], []
    monkeypatch.setattr(attention, "kernels_on_gpu", lambda heads: said.append(heads) or FUSED)
    monkeypatch.setattr(attention, "on_kernels", lambda q, k, masked, dropout: chosen.append(
        Heads(q.size(1), k.size(1), q.size(3), q.dtype, dropout, masked)) or nullcontext())
    monkeypatch.setattr(attention.tensor_parallel, "get_cuda_rng_tracker",
                        lambda: SimpleNamespace(fork=nullcontext))
    core = SimpleNamespace(config=config, dropout=0.1, scale=None, training=training)
    q, k, v = (torch.ones(5, 2, n, 16, dtype=torch.bfloat16) for n in (queries, groups, groups))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril() if masked else None
    assert SdpaCoreAttention.forward(core, q, k, v, mask).shape == (5, 2, queries * 16)
    SdpaCoreAttention.describe(core, masked)
    assert said == chosen == [Heads(queries, groups, 16, torch.bfloat16, 0.1, masked)]


class OnCpu(TorchFunctionMode):
    """Tensors meant for a GPU are made here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))


@pytest.mark.parametrize("heads", [GPT2, replace(GPT2, masked=True), ODD])
@pytest.mark.parametrize(("kernel", "runs"), [
    (SDPBackend.MATH, True), (SDPBackend.FLASH_ATTENTION, True),
    (SDPBackend.CUDNN_ATTENTION, False)])
def test_a_kernel_is_tried_forward_and_backward_and_only_if_asked_for(heads, kernel, runs):
    """On CPU, which has the first two."""
    with OnCpu(), torch.no_grad():
        assert sdpa._runs_on_gpu([kernel], heads) is runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("heads", [GPT2, replace(GPT2, masked=True), replace(GPT2, groups=4),
                                   replace(GPT2, groups=4, masked=True),
                                   replace(GPT2, width=128, dropout=0.1)])
def test_a_fused_kernel_takes_it_on_a_gpu(heads):
    assert SDPBackend.MATH not in kernels_on_gpu(heads)
