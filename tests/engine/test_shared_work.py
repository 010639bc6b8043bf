"""What replicas share out, what ranks agree on, which weights decay and what the log says computes,
by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_spdf.engine import common
from megatron_spdf.engine.state import share_replicas, snapshot
from megatron_spdf.model.attention import SdpaCoreAttention
from megatron_spdf.model.parametrization import Peak

WORLD = 3


def held(rank: int) -> dict:
    """Tensors that all replicas hold, as one of them has shared them out."""
    sizes = {"a": {"first": 6, "second": 2, "third": 2}, "b": {"fourth": 3, "fifth": 2}}
    state = {chunk: {key: SimpleNamespace(data=torch.ones(size), replica_id=(4, 0, 7))
                     for key, size in keys.items()} for chunk, keys in sizes.items()}
    share_replicas(state, rank, WORLD)
    return {key: tensor for chunk in state.values() for key, tensor in chunk.items()}


def test_each_tensor_is_saved_by_the_replica_with_the_least_so_far():
    """Of 6, 2, 2, 3 and 2 numbers: 6 | 2, 3 | 2, 2."""
    replicas = [held(rank) for rank in range(WORLD)]
    owners = {key: [rank for rank in range(WORLD) if replicas[rank][key].replica_id[-1] == 0]
              for key in replicas[0]}
    assert owners == {"first": [0], "second": [1], "third": [2], "fourth": [1], "fifth": [2]}
    for key in owners:
        found = [there[key].replica_id for there in replicas]
        assert sorted(found) == [(4, 0, number) for number in range(WORLD)]


def test_what_a_replica_saves_is_copied_and_the_rest_is_left():
    own, other = (SimpleNamespace(data=torch.ones(2), replica_id=(0, 0, n)) for n in (0, 1))
    before = own.data, other.data
    snapshot({"chunk": {"own": own, "other": other}})
    for tensor in before:
        tensor.zero_()
    assert own.data.tolist() == [1.0, 1.0] and other.data is before[1]


@pytest.mark.parametrize(("others", "stops"), [(0, False), (2, True)])
@pytest.mark.parametrize("stop", [False, True])
def test_ranks_agree_on_the_mean_loss_and_on_stopping(monkeypatch, others, stops, stop):
    """Of three replicas: the others say 2 and 4.5; this one 1."""
    added = torch.tensor([(2.0 + 4.5) / 3, float(others)])
    monkeypatch.setattr(common.dist, "all_reduce", lambda shared: shared.add_(added))
    found = common.agree(torch.tensor(1.0), 3, stop, torch.tensor(7.0), torch.tensor(8.0))
    assert found == (pytest.approx(2.5), stops or stop, 7.0, 8.0)


def test_matrices_decay_but_for_those_that_the_algorithm_pulls(recipe, monkeypatch):
    made = recipe(optimizer={"lr": 1e-2, "norm_lr": 2e-3, "min_lr_ratio": 0.5,
                             "weight_decay": 0.3})
    model = nn.ParameterDict({"matrix": torch.ones(2, 2), "pulled": torch.ones(3, 3),
                              "bias": torch.ones(2), "norm": torch.ones(5)})
    for name, parameter in model.items():
        parameter.peak = Peak(2e-3) if name == "norm" else Peak(1e-2)
        parameter.own_decay = name == "pulled"
    monkeypatch.setattr(common.dist, "get_world_size", lambda: 2)

    def gather(found: list, mine: set) -> None:
        found[:] = [mine, {Peak(5e-3)}]  # of a rank that has other weights

    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    assert common.other_peaks(made, [model]) == [Peak(2e-3), Peak(5e-3)]
    groups = common.build_optimizer(made, model).param_groups
    found = [({name for name, p in model.items() if any(p is q for q in group["params"])},
              group["wd_mult"], group["max_lr"], group["min_lr"]) for group in groups]
    assert found == [({"matrix"}, 1.0, 1e-2, 5e-3), ({"pulled", "bias"}, 0.0, 1e-2, 5e-3),
                     ({"norm"}, 0.0, 2e-3, 1e-3)]


class Attention(SdpaCoreAttention):
    """Says what it is asked."""

    def __init__(self):
        nn.Module.__init__(self)

    def describe(self, masked: bool) -> str:
        return "kernels of masks" if masked else "kernels"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_log_says_what_computes_each_part(recipe, monkeypatch, gpu, fused):
    """On a GPU which kernels: with a mask where documents are kept apart."""
    made = recipe(data={"reset_attention": fused}, kernels={"cuda_graph": gpu})
    layer = SimpleNamespace(self_attention=SimpleNamespace(core_attention=Attention()),
                            pre_mlp_layernorm=nn.LayerNorm(2))
    model = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]), modules=lambda: [],
                            config=SimpleNamespace(bias_dropout_fusion=fused,
                                                   params_dtype=torch.bfloat16))
    device = torch.device("cuda" if gpu else "cpu")
    monkeypatch.setattr(common.torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(common, "describe_softmax", lambda *asked: " ".join(map(str, asked)))
    monkeypatch.setattr(common.dispatch, "backend_name", lambda kind: f"backend of {kind}")
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=fused)
    room = Attention.__module__.split(".")[0]
    on = (" on kernels of masks" if fused else " on kernels") if gpu else ""
    assert common.implementation_summary(made, model, adam, device) == (
        f"device {'H100' if gpu else 'CPU (gloo, stand-in for CUDA)'}"
        f"{'; forward and backward one CUDA graph' if gpu else ''}; attention {room}.Attention{on}"
        f", norm torch.LayerNorm, optimizer torch.AdamW{' fused' if fused else ''}; "
        f"bias, activation and dropout {'compiled' if fused else 'one by one'}; "
        f"loss {device.type} torch.bfloat16; expand/compress backend of {device.type}")
