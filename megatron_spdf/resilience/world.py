"""Rank, world size and local rank of this process, from torchrun, srun or a plain start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_spdf.recipe.recipe import Parallel
from megatron_spdf.resilience.slurm import is_task
from megatron_spdf.text import counted


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all.

    Attributes:
        rank, world: among all processes of the run.
        local: rank on this host.
        launcher: torchrun, srun or python.
    """

    rank: int
    world: int
    local: int
    launcher: str


def find_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK (torchrun, deepspeed), else SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID of an srun step. Without them this is the only process.

    Raises:
        ValueError: a launcher has set some of its variables and not all, or not to numbers, or
            srun has not started all ranks.
    """
    names = {"torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if "RANK" not in env and is_task(env):  # an sbatch script alone has SLURM_PROCID too
        names["srun"] = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    for launcher, keys in names.items():
        if not any(k in env for k in keys):
            continue
        missing = [k for k in keys if k not in env]
        if missing:
            raise ValueError(f"{launcher} set {', '.join(k for k in keys if k in env)} but not "
                             f"{', '.join(missing)}; start with torchrun or srun, or unset the "
                             "others")
        shown = ", ".join(f"{k}={env[k]!r}" for k in keys)
        try:
            ranks = Ranks(*(int(env[k]) for k in keys), launcher=launcher)
        except ValueError:
            raise ValueError(f"{shown} must be whole numbers; start with torchrun or srun, or "
                             "unset them") from None
        if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local < ranks.world):
            raise ValueError(f"{shown}: ranks are counted from 0 and under the number of "
                             "processes; start with torchrun or srun, or unset them")
        return ranks
    return Ranks(0, 1, 0, "python")


def check_world(ranks: Ranks, parallel: Parallel) -> None:
    """Refuses a world of another size than the layout, above all a world of one by mistake.

    Raises:
        ValueError: naming both sizes and the ways to make them agree.
    """
    if ranks.world == parallel.world:
        return
    model_ranks = parallel.tensor * parallel.pipeline
    needed = counted(parallel.world, "process", "processes")
    ways = [f"start {needed} (torchrun --nproc-per-node N, or srun --ntasks {parallel.world})"]
    if ranks.world % model_ranks == 0:
        ways.append(f"set parallel.data={ranks.world // model_ranks}")
    raise ValueError(
        f"the recipe's layout needs {needed} (parallel.tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x data {parallel.data}), but {ranks.launcher} started {ranks.world}; "
        f"{' or '.join(ways)}")
