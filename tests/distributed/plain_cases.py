"""Cases of `sparsify` under PyTorch's own data parallelism: DDP and FSDP2, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from harness import agree_on_port
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_spdf import densify, sparsify

STEPS, WIDTH = 10, 32
WHOLE = StateDictOptions(full_state_dict=True)


class Decoder(nn.Module):
    """Two of PyTorch's transformer layers, whose linear layers are of three classes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(
            WIDTH, 4, 64, dropout=0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 10) of x (B, T, WIDTH)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_model(**settings) -> Decoder:
    """The model from given initial values, sparse."""
    torch.manual_seed(1)
    model = Decoder()
    return sparsify(model, **{"level": 0.75, **settings}) if settings.get("level") != 0 else model


def batches(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(4, 5, WIDTH, generator=draw) for _ in range(count)]


def train(model: nn.Module, make_optimizer: Callable, count: int, share: slice) -> list[float]:
    """Losses of `count` steps on a share of every batch."""
    optimizer, losses = make_optimizer(model.parameters()), []
    for x in batches(count):
        optimizer.zero_grad()
        loss = model(x[share]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def joined():
    agree_on_port()
    dist.init_process_group("gloo")
    yield slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    dist.destroy_process_group()


def adam(parameters) -> torch.optim.Optimizer:
    # Gradients of key biases are zero but for rounding, which a small epsilon would blow up.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def alone() -> dict[str, Tensor]:
    """The weights that one process comes to, on whole batches."""
    model = make_model()
    train(model, adam, STEPS, slice(None))
    return model.state_dict()


def ddp() -> dict:
    """The same on half a batch each; and the buffers that DDP broadcasts before a forward."""
    with joined() as share:
        model = DistributedDataParallel(make_model())
        train(model, adam, STEPS, share)
        return {"state": model.module.state_dict(), "broadcast": len(model.modules_buffers)}


def fsdp() -> dict:
    """The same with sharded layers; a shard's part of the parameters; the outputs of fresh models,
    one in a process and a sharded one with other masks, that load what was saved; and what
    `densify` says of shards."""
    with joined() as share:
        model = shard(make_model())
        train(model, adam, STEPS, share)
        held = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}
        whole = get_model_state_dict(model, options=WHOLE)
        x, other = batches(1)[0], shard(make_model(seed=9))
        set_model_state_dict(other, dict(whole), options=WHOLE)  # which changes what it is given
        fresh = make_model(seed=9)
        fresh.load_state_dict(whole)
        try:
            densify(model)
        except ValueError as error:
            refused = str(error)
        with torch.no_grad():
            return {"state": whole, "held": held, "refused": refused,
                    "outputs": [found(x) for found in (model, other, fresh)]}


def shard(model: Decoder) -> Decoder:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
