"""The stand-in for CUDA: what it stands in for, and that it keeps off a machine with a GPU. It
replaces functions of torch for the rest of a process, so all is tried in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, torch
from megatron_spdf.parallel import fake_cuda

found = {}
have_gpu, watched = torch.cuda.is_available, (torch.cuda, torch.Tensor, torch.nn.Module)
torch.cuda.is_available = lambda: True
def now():
    factories = {name: getattr(torch, name) for name in fake_cuda.FACTORIES}
    return [factories, *(dict(vars(place)) for place in watched)]
before = now()
found["refuses on a GPU"] = fake_cuda.install() is False
found["replaces nothing on a GPU"] = (
    now() == before and not fake_cuda._installed
    and torch.ones(1).type() == "torch.FloatTensor")
torch.cuda.is_available = have_gpu

def in_context(device):
    with torch.device(device):
        return torch.zeros(2), torch.tensor([1]), torch.rand(3), torch.arange(3)

def counted(n: int):
    return torch.arange(n)

compile = torch.compile
found["installs"] = fake_cuda.install() is True
import sys, megatron.core.fusions.fused_bias_gelu as fused
found["fusions are not compiled"] = not hasattr(fused.bias_gelu, "_torchdynamo_orig_callable")
found["the compiler is not imported"] = (
    (
    "torch._inductor.compile_fx" not in sys.modules and torch.compile is compile))
found["installs once"] = (
    (
    fake_cuda.install() is True and torch.ones(1).type() == "torch.cuda.FloatTensor"))
found["factory with device"] = [str(t.device) for t in (
    torch.zeros(2, device="cuda"), torch.empty(2, device=torch.device("cuda", 0)),
    torch.tensor([1], device="cuda:0"),
    torch.full((2,), 1.0, device="cuda"), torch.arange(3, device="cuda"))] == ["cpu"] * 5
found["factory on current device"] = (
    str(torch.ones(1, device=torch.cuda.current_device()).device) == "cpu")
found["factory in a context"] = all(t.is_meta for t in in_context("meta"))
found["factory in a script"] = torch.equal(torch.jit.script(counted)(3), torch.arange(3))
found["factory by type"] = torch.zeros(2, dtype=torch.int8).dtype == torch.int8
x = torch.ones(1)
found["methods with device"] = [str(t.device) for t in (
    x.to(device="cuda"), x.new_zeros(2, device="cuda"), x.new_tensor([1], device="cuda"),
    x.new_full((2,), 1.0, device=torch.device("cuda", 0)))] == ["cpu"] * 4
x = torch.ones(2)
found["Tensor.cuda"] = x.cuda() is x and x.cuda(0, non_blocking=True) is x
layer = torch.nn.Linear(2, 2)
found["Module.cuda"] = layer.cuda() is layer and layer.cuda(0) is layer
found["Tensor.type names"] = [
    torch.ones(1, dtype=d).type() for d in (torch.float32, torch.bfloat16, torch.int64)] == [
    "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.LongTensor"]
found["Tensor.type conversion"] = x.type(torch.int64).dtype == torch.int64
found["current_device"] = str(torch.cuda.current_device()) == "cpu"
found["synchronize"] = torch.cuda.synchronize() is None and torch.cuda.synchronize(0) is None
found["current_stream"] = (
    torch.cuda.current_stream() is None and torch.cuda.current_stream(0) is None)

torch.cuda.manual_seed(3)
state, first = torch.cuda.get_rng_state(), torch.rand(4)
moved = not torch.equal(torch.rand(4), first)
torch.cuda.set_rng_state(state, device=0)
found["random state round trip"] = moved and torch.equal(torch.rand(4), first)
torch.cuda.manual_seed(3)
found["manual_seed"] = torch.equal(torch.rand(4), first)

import megatron.core.tensor_parallel.random as megatron_random
torch.manual_seed(4)
state, first = megatron_random._get_cuda_rng_state(), torch.rand(4)
torch.rand(4)
megatron_random._set_cuda_rng_state(state, device=-1, graph_safe=False)
found["random state of Megatron-Core"] = torch.equal(torch.rand(4), first)
megatron_random.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
tracker = megatron_random.get_cuda_rng_tracker()
with tracker.fork():
    inside = torch.rand(4)
outside = torch.rand(4)
megatron_random.model_parallel_cuda_manual_seed(
    5, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
with megatron_random.get_cuda_rng_tracker().fork():
    found["tracker of Megatron-Core"] = (
        torch.equal(torch.rand(4), inside) and not torch.equal(inside, outside))
print("FOUND", json.dumps(found))
"""

CHECKS = [
    "refuses on a GPU", "replaces nothing on a GPU", "installs", "fusions are not compiled",
    "the compiler is not imported", "installs once", "factory with device",
    "factory on current device", "factory in a context", "factory in a script", "factory by type",
    "methods with device",
    "Tensor.cuda", "Module.cuda", "Tensor.type names", "Tensor.type conversion", "current_device",
    "synchronize",
    "current_stream", "random state round trip", "manual_seed", "random state of Megatron-Core",
    "tracker of Megatron-Core"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, bool]:
    program = tmp_path_factory.mktemp("stand-in") / "program.py"  # TorchScript reads its source
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], cwd=ROOT, env={
        **os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND ")[2])


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_stand_in(found, check):
    assert found[check]
