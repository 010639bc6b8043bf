"""Start-up check: every rank reports to rank 0, which names ranks that are missing or cannot be
reached, and clocks that are off.

Everything goes through the store that process groups are made with, so no collective has to work.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from megatron_spdf.resilience.connections import (
    Listener,
    answering,
    connect,
    own_address,
    shared_token,
)
from megatron_spdf.resilience.slurm import hosts_of_ranks, this_host
from megatron_spdf.text import counted

POLL_SECONDS = 0.05
SAY_SECONDS = 30.0  # between two lines about missing ranks
REACH_SECONDS = 20.0  # for a connection to a neighbor
SKEW_SECONDS = 2.0  # of a clock, above which there is a warning
FREE_SHARE = 0.8  # of the median free memory, below which there is a warning


class Unhealthy(RuntimeError):
    """Ranks are missing, or cannot reach each other."""


@dataclass(frozen=True)
class RankReport:
    """Report of a rank at startup.

    Attributes:
        device: name of the GPU, or "cpu".
        free: free memory of the device in bytes.
        address: host and port where the rank listens for its neighbor.
    """

    rank: int
    host: str
    device: str
    free: int
    address: tuple[str, int]


def check_in(rank: int, world: int, store: dist.Store, device: torch.device, seconds: float) -> str:
    """Waits until all ranks are there and reach their neighbors. All ranks call.

    Args:
        rank, world: this process and the number of processes.
        store: shared by all ranks.
        device: of this rank.
        seconds: longest wait of the first rank for the last.

    Returns:
        A line for each host and each warning, for rank 0 to print.

    Raises:
        Unhealthy: on every rank alike, naming the ranks at fault and their hosts.
    """
    token = shared_token(store)
    with answering(Listener(own_address(), token, f"start-up check of rank {rank}")) as listener:
        mine = RankReport(rank, this_host(), *_device(device), listener.address)
        store.set(f"report/{rank}", json.dumps(asdict(mine)))
        if rank == 0:
            outcome = _coordinate(world, store, seconds)
            store.set("outcome", json.dumps(outcome))
        else:
            _reply(rank, store, seconds)
        outcome = json.loads(_get(store, "outcome", seconds + 2 * REACH_SECONDS))
    store.set(f"read/{rank}", "")
    if outcome["fault"]:
        if rank == 0:  # hosts the store, so it exits last
            _wait_for(store, [f"read/{r}" for r in range(world)], 5.0)
        raise Unhealthy(outcome["fault"])
    return outcome["said"]


def _coordinate(world: int, store: dist.Store, seconds: float) -> dict[str, str]:
    """Rank 0: collects the reports, compares clocks, has every rank reach the next.

    Returns:
        `fault`, empty where there is none, and `said`, the lines to print.
    """
    missing, spread = _await_reports(world, store, seconds)
    if missing:
        store.set("addresses", json.dumps([]))
        hosts = hosts_of_ranks()
        named = ", ".join(f"{r} on {hosts[r]}" if r in hosts else str(r) for r in missing[:16])
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        return {"said": "", "fault": (
            f"{len(missing)} of {world} ranks did not report within "
            f"fault_tolerance.join_seconds={seconds:g}: rank {named}{more}. Look at these nodes "
            "(sinfo -R, tools/doctor.py), exclude them (sbatch --exclude), or raise the limit")}
    reports = [RankReport(**json.loads(store.get(f"report/{r}"))) for r in range(world)]
    asked = time.time()
    began = time.monotonic()
    store.set("addresses", json.dumps([r.address for r in reports]))
    _reply(0, store, seconds)
    left = began + 2 * REACH_SECONDS - time.monotonic()
    _wait_for(store, [f"reply/{r}" for r in range(world)], left)
    ended = asked + time.monotonic() - began  # the clock may have been set meanwhile
    faults, skews = _read_replies(reports, store, asked, ended)
    if faults:
        return {"said": "", "fault": (
            f"{'; '.join(faults)}. Look at the network between these nodes and their firewalls; "
            "launch/common.sh says which interface is used")}
    return {"said": render(reports, skews, spread), "fault": ""}


def _read_replies(reports: Sequence[RankReport], store: dist.Store, asked: float,
                  ended: float) -> tuple[list[str], list[float]]:
    """Faults as sentences, and the least skew of each rank's clock in seconds.

    Args:
        asked, ended: times on rank 0's clock between which the replies were given.
    """
    faults, skews = [], []
    for report in reports:
        if not store.check([f"reply/{report.rank}"]):
            faults.append(f"rank {report.rank} on {report.host} reported and then fell silent")
            skews.append(0.0)
            continue
        reply = json.loads(store.get(f"reply/{report.rank}"))
        skews.append(min(0.0, reply["clock"] - asked) + max(0.0, reply["clock"] - ended))
        if reply["fault"]:
            there = reports[(report.rank + 1) % len(reports)]
            faults.append(f"rank {report.rank} on {report.host} cannot reach rank {there.rank} on "
                          f"{there.host} at {there.address[0]}, port {there.address[1]} "
                          f"({reply['fault']})")
    return faults, skews


def _await_reports(world: int, store: dist.Store,
                   seconds: float) -> tuple[list[int], tuple[float, int]]:
    """Ranks that did not report in time, and (seconds between the first report and the last, rank
    of the last)."""
    began = said = first = time.monotonic()
    waiting, last = list(range(world)), 0
    while waiting and time.monotonic() - began < seconds:
        came = [r for r in waiting if store.check([f"report/{r}"])]
        if came:
            first = first if len(waiting) < world else time.monotonic()
            last = came[-1]
            waiting = [r for r in waiting if r not in came]
        if waiting and time.monotonic() - said > SAY_SECONDS:
            said, hosts = time.monotonic(), hosts_of_ranks()
            named = ", ".join(f"{r} on {hosts.get(r, '?')}" for r in waiting[:8])
            print(f"waiting for rank {named}{' and others' if len(waiting) > 8 else ''}, "
                  f"{said - began:.0f} s", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    return waiting, (time.monotonic() - first, last)


def _reply(rank: int, store: dist.Store, seconds: float) -> None:
    """Reads the clock as soon as it is asked for, connects to the next rank, and replies with
    both."""
    addresses = json.loads(_get(store, "addresses", seconds + REACH_SECONDS))
    if not addresses:
        return
    clock, fault = time.time(), ""
    try:
        host, port = addresses[(rank + 1) % len(addresses)]
        connect((host, port), shared_token(store), REACH_SECONDS).close()
    except OSError as error:
        fault = str(error)
    store.set(f"reply/{rank}", json.dumps({"clock": clock, "fault": fault}))


def render(reports: Sequence[RankReport], skews: Sequence[float], spread: tuple[float, int]) -> str:
    """Lines for people: one for each host, then the warnings.

    Args:
        skews: least offset of each rank's clock from rank 0's, in seconds.
        spread: seconds between the first report and the last, and the last rank.
    """
    lines, seconds, last = [], *spread
    for host in dict.fromkeys(r.host for r in reports):
        there = [r for r in reports if r.host == host]
        skew = max((skews[r.rank] for r in there), key=abs)
        lines.append(f"{host}: rank {_span([r.rank for r in there])}, "
                     f"{', '.join(sorted({r.device for r in there}))}, "
                     f"{min(r.free for r in there) / 2**30:,.1f} GiB free, clock {skew:+.3f} s")
        if abs(skew) > SKEW_SECONDS:
            lines.append(f"warning: the clock of {host} is {skew:+.1f} s off that of "
                         f"{reports[0].host}; logs of the two will not agree, have it synchronized")
    lines.append(f"all {counted(len(reports), 'rank')} reported within {seconds:.1f} s, rank "
                 f"{last} last")
    usual = statistics.median(r.free for r in reports)
    lines += [f"warning: rank {r.rank} on {r.host} has {r.free / 2**30:,.1f} GiB free, others "
              f"{usual / 2**30:,.1f}; is another process on that device?" for r in reports
              if r.device != "cpu" and r.free < FREE_SHARE * usual]
    return "\n".join(lines)


def _span(ranks: list[int]) -> str:
    whole = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _device(device: torch.device) -> tuple[str, int]:
    """Name and free bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    return "cpu", psutil.virtual_memory().available


def _get(store: dist.Store, key: str, seconds: float) -> bytes:
    try:
        store.wait([key], timedelta(seconds=seconds))
        return store.get(key)
    except RuntimeError as error:
        raise Unhealthy(
            f"rank 0 on {os.environ.get('MASTER_ADDR')} does not answer within "
            f"{seconds:g} s ({str(error).splitlines()[0]}); look at that node"
        ) from None


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> None:
    """Waits until all keys are set, at most for so long."""
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(POLL_SECONDS / 5)
