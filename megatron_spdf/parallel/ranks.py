"""Who this process is: rank, world and local rank from torchrun, srun or a plain start, and the
joining of ranks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_spdf.recipe.recipe import Recipe
from megatron_spdf.resilience import startup_check
from megatron_spdf.resilience.world import Ranks


def init_distributed(ranks: Ranks, recipe: Recipe) -> torch.device:
    """Joins all ranks of the run, has each of them report, and sets up Megatron-Core's process
    groups; returns this rank's device.

    Raises:
        ValueError: more local ranks than GPUs, no way to find the head node, or its port is taken.
        Unhealthy: a rank is missing, or out of reach of another.
    """
    # Megatron-Core's overlap relies on launch order
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _device(ranks)
    timeout = timedelta(seconds=recipe.parallel.timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1,
                                timeout=timeout)
    else:
        store = _rendezvous(ranks, recipe.fault_tolerance.join_seconds)
        said = startup_check.check_in(ranks.rank, ranks.world, dist.PrefixStore("health", store),
                                      device,
                               recipe.fault_tolerance.join_seconds)
        if ranks.rank == 0:
            print(said, flush=True)
        dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=ranks.rank,
                                world_size=ranks.world, timeout=timeout)
    set_up_groups(recipe)
    return device


def _rendezvous(ranks: Ranks, seconds: float) -> dist.Store:
    """The store that all ranks share, kept by rank 0 or by torchrun's agent."""
    _find_head_node(ranks)
    head, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(head, port, is_master=keeps, wait_for_workers=False,
                              timeout=timedelta(seconds=seconds))
    except (
        RuntimeError
    ) as error:  # of torch.distributed, a class of which is for each cause in some versions only
        reason = str(error).splitlines()[0]
        if keeps:
            raise ValueError(
                f"port {port} cannot be opened on {socket.gethostname()}, the head "
                f"node ({reason}); export MASTER_PORT=<a free port>"
            ) from None
        raise startup_check.Unhealthy(
            f"rank {ranks.rank} on {socket.gethostname()} cannot reach "
            f"rank 0 at {head}:{port} "
            f"within fault_tolerance.join_seconds={seconds:g} ({reason}); look "
            "at the head node, its firewall and the network"
        ) from None
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def set_up_groups(recipe: Recipe) -> None:
    """Megatron-Core's process groups of the recipe's layout, among ranks that are joined."""
    from megatron.core import parallel_state, tensor_parallel

    p = recipe.parallel
    parallel_state.initialize_model_parallel(
        p.tensor, p.pipeline,
        virtual_pipeline_model_parallel_size=p.interleave if p.interleave > 1 else None,
        distributed_timeout_minutes=max(1, p.timeout // 60), create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed)


def init_gloo(ranks: Ranks, timeout: timedelta) -> torch.device:
    """Joins ranks that each do a share of the work and exchange small objects at its end; returns
    this rank's device.

    Args:
        timeout: how long the fastest may wait for the slowest.

    Raises:
        ValueError: more local ranks than GPUs, or no way to find the head node.
    """
    device = _device(ranks)
    if ranks.world > 1:
        _find_head_node(ranks)
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world, timeout=timeout)
    return device


def destroy() -> None:
    """Takes the process groups down."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed and deepspeed.is_initialized():  # it remembers groups
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # --gpus-per-task or --gpu-bind shows each task its own GPU
    if visible == 1 and ranks.launcher == "srun":
        local = 0
    else:
        local = ranks.local
    if local >= visible:
        raise ValueError(f"local rank {local} has no GPU: {visible} visible here; start at most "
                         "one process per GPU (--ntasks-per-node or --nproc-per-node)")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _find_head_node(ranks: Ranks) -> None:
    """Fills MASTER_ADDR and MASTER_PORT under srun: the first host of the step, a port derived from
    the job."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        if not nodes or not shutil.which("scontrol"):
            raise ValueError("MASTER_ADDR is not set and there is no Slurm node list to find the "
                             "head node in; export MASTER_ADDR=<host of rank 0>")
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True,
                               text=True, check=False)
        if shown.returncode or not shown.stdout.split():
            raise ValueError(f"scontrol cannot expand the node list {nodes!r} "
                             f"({shown.stderr.strip()}); export MASTER_ADDR=<host of rank 0>")
        os.environ["MASTER_ADDR"] = shown.stdout.split()[0]
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except OSError as error:
        raise ValueError(f"the head node {os.environ['MASTER_ADDR']!r} cannot be resolved on "
                         f"{socket.gethostname()} ({error}); export MASTER_ADDR=<a name or address "
                         "of rank 0's host that all nodes know>"
                         ) from None
    os.environ.setdefault("MASTER_PORT",
                          str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
