"""Joining of ranks: rendezvous, start-up check, process groups."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience import slurm, startup_check
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.text import first_line

JOIN_SECONDS = 600  # that ranks of an evaluation wait for the last to come
SHARE_SECONDS = 21_600  # that ranks wait for the slowest one's share of an evaluation


@dataclass(frozen=True)
class Joined:
    """A rank that has met all others.

    Attributes:
        ranks: this process among all.
        device: of this rank.
        store: shared by all ranks.
    """

    ranks: Ranks
    device: torch.device
    store: dist.Store


def init_distributed(ranks: Ranks, recipe: Recipe) -> torch.device:
    """Joins all ranks of the run and makes their process groups, see `join` and `init_groups`.

    Returns:
        The device of this rank.
    """
    joined = join(ranks, recipe)
    init_groups(joined, recipe)
    return joined.device


def join(ranks: Ranks, recipe: Recipe) -> Joined:
    """Joins all ranks of the run and checks that each is there.

    Args:
        ranks: this process among all.
        recipe: gives the timeouts.

    Raises:
        ValueError: more local ranks than GPUs, no way to find the head node, its port is taken, or
            a network interface that was named is not there.
        Unhealthy: a rank is missing, or cannot reach another.
    """
    _require_interfaces()
    # Megatron-Core overlaps traffic with compute by the order of launches
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _device(ranks)
    if ranks.world == 1:
        return Joined(ranks, device, dist.HashStore())
    join_seconds = recipe.fault_tolerance.join_seconds
    store = _rendezvous(ranks, join_seconds)
    said = startup_check.check_in(ranks.rank, ranks.world, dist.PrefixStore("health", store),
                                  device, join_seconds)
    if ranks.rank == 0:
        print(said, flush=True)
    return Joined(ranks, device, store)


def init_groups(joined: Joined, recipe: Recipe) -> None:
    """Makes the process groups of joined ranks, those of Megatron-Core for the layout of the recipe
    among them."""
    dist.init_process_group("nccl" if joined.device.type == "cuda" else "gloo",
                            store=dist.PrefixStore("groups", joined.store), rank=joined.ranks.rank,
                            world_size=joined.ranks.world,
                            timeout=timedelta(seconds=recipe.parallel.timeout))
    set_up_groups(recipe)


def _rendezvous(ranks: Ranks, seconds: float) -> dist.Store:
    """Connects to the store that all ranks share, hosted by rank 0 or by torchrun's agent."""
    _find_head_node(ranks)
    head, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(head, port, is_master=hosts, wait_for_workers=False,
                              timeout=timedelta(seconds=seconds))
    except RuntimeError as error:  # some versions of PyTorch have no class for each cause
        reason = first_line(error)
        if hosts:
            raise ValueError(f"port {port} cannot be opened on {socket.gethostname()}, the head "
                             f"node ({reason}); export MASTER_PORT=<a free port>") from None
        raise startup_check.Unhealthy(
            f"rank {ranks.rank} on {socket.gethostname()} cannot reach rank 0 at {head}:{port} "
            f"within fault_tolerance.join_seconds={seconds:g} ({reason}); look at the head node, "
            "its firewall and the network") from None
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def set_up_groups(recipe: Recipe) -> None:
    """Makes Megatron-Core's process groups for the layout of the recipe, among joined ranks."""
    from megatron.core import parallel_state, tensor_parallel

    p = recipe.parallel
    parallel_state.initialize_model_parallel(
        p.tensor, p.pipeline,
        virtual_pipeline_model_parallel_size=p.interleave if p.interleave > 1 else None,
        distributed_timeout_minutes=max(1, p.timeout // 60), create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)


def init_gloo(ranks: Ranks) -> torch.device:
    """Joins ranks that divide some work and exchange small objects at its end.

    Args:
        ranks: this process among all.

    Returns:
        The device of this rank.

    Raises:
        ValueError: more local ranks than GPUs, no way to find the head node, a network interface
            that was named is not there, or a rank has not come.
    """
    _require_interfaces()
    device = _device(ranks)
    if ranks.world > 1:
        store = _rendezvous(ranks, JOIN_SECONDS)
        _await_all(ranks, store)
        dist.init_process_group("gloo", store=dist.PrefixStore("groups", store), rank=ranks.rank,
                                world_size=ranks.world, timeout=timedelta(seconds=SHARE_SECONDS))
    return device


def _await_all(ranks: Ranks, store: dist.Store) -> None:
    """Waits until all ranks are there: gloo would as long as for a share."""
    keys = [f"here/{rank}" for rank in range(ranks.world)]
    store.set(keys[ranks.rank], "")
    try:
        store.wait(keys, timedelta(seconds=JOIN_SECONDS))
    except RuntimeError:
        gone = ", ".join(str(r) for r, key in enumerate(keys) if not store.check([key]))
        raise ValueError(f"rank {gone} of {ranks.world} did not come within {JOIN_SECONDS} s; look "
                         "at what it said, and start all ranks again") from None


def destroy() -> None:
    """Destroys the process groups, DeepSpeed's too."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed and deepspeed.is_initialized():  # it keeps references to groups
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # --gpus-per-task and --gpu-bind show each task its own GPU only
    local = 0 if visible == 1 and ranks.launcher == "srun" else ranks.local
    if local >= visible:
        raise ValueError(f"local rank {local} has no GPU: {visible} visible here; start at most "
                         "one process per GPU (--ntasks-per-node or --nproc-per-node)")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _require_interfaces() -> None:
    """Raises a ValueError where GLOO_SOCKET_IFNAME names an interface that this machine has not."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    if missing := [name for name in named.split(",") if named and name not in there]:
        raise ValueError(f"GLOO_SOCKET_IFNAME={named}: {socket.gethostname()} has no network "
                         f"interface {missing[0]!r}, only {', '.join(there)}; export the name of "
                         "the one that reaches the other nodes, or unset it")


def _find_head_node(ranks: Ranks) -> None:
    """Sets MASTER_ADDR and MASTER_PORT where the launcher has not: the first host of srun's step,
    and a port that follows from the job."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = slurm.head_node()
    if not slurm.resolves(os.environ["MASTER_ADDR"]):
        raise ValueError(f"the head node {os.environ['MASTER_ADDR']!r} cannot be resolved on "
                         f"{socket.gethostname()}; export MASTER_ADDR=<a name or address of rank "
                         "0's host that all nodes know>")
    os.environ.setdefault("MASTER_PORT",
                          str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT={port!r} is no port; export MASTER_PORT=<a free one, 1 to "
                         "65535>")
