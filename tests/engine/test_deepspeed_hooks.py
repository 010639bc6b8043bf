"""Gradients that DeepSpeed leaves to us are summed over tensor-parallel ranks and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_spdf.architecture.base import HEAD_NORMS
from megatron_spdf.engine import deepspeed


@pytest.mark.parametrize(("tensor", "summed"), [(1, {"shared"}), (2, {"shared", "head"})])
def test_what_each_rank_has_a_part_of_is_summed_over_tensor_parallel_ranks(monkeypatch, tensor,
                                                                           summed):
    model = nn.Module()
    for name in ("shared", "own", "head"):
        model.register_parameter(name, nn.Parameter(torch.ones(2)))
    model.shared.sequence_parallel = True
    names = {"shared": model.shared, "own": model.own, f"0.{HEAD_NORMS[0]}.weight": model.head}
    monkeypatch.setattr(model, "named_parameters", names.items)
    groups = []

    def all_reduce(gradient, group=None):
        groups.append(group)
        gradient.mul_(3)

    monkeypatch.setattr(deepspeed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(deepspeed.ps, "get_tensor_model_parallel_group", lambda: "tensor")
    deepspeed._sum_partial_gradients(model, tensor)
    (model.shared + model.own + model.head).sum().backward()
    for name in ("shared", "own", "head"):
        assert getattr(model, name).grad.tolist() == [3.0 if name in summed else 1.0] * 2
    assert groups == ["tensor"] * len(summed)
