"""Before step 1: every rank reports to rank 0, which names those that are missing, out of reach or
out of step.

All goes through the store that the process groups meet in, so nothing of this needs a working
collective.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

POLL_SECONDS = 0.05
SAY_SECONDS = 30.0  # between two sentences on who is waited for
REACH_SECONDS = 20.0  # for a connection to a neighbor
SKEW_SECONDS = 2.0  # of a clock, from where it is worth a warning
FREE_SHARE = 0.8  # of the median, below which a GPU's free memory is worth a warning


class Unhealthy(RuntimeError):
    """Ranks are missing, or cannot reach each other."""


@dataclass(frozen=True)
class Report:
    """A rank's first words. `address` is where it listens for its neighbor, `free` in bytes."""

    rank: int
    host: str
    device: str
    free: int
    address: tuple[str, int]


def check_in(rank: int, world: int, store: dist.Store, device: torch.device, seconds: float) -> str:
    """Waits until all ranks are there and reach their neighbors; all ranks call.

    Args:
        store: that all ranks share.
        seconds: that the first waits for the last.

    Returns:
        A line for each host and each thing out of the ordinary, for rank 0 to say.

    Raises:
        Unhealthy: on every rank alike, naming the ranks at fault and their hosts.
    """
    with socket.create_server(("", 0), backlog=16) as door:
        mine = Report(rank, socket.gethostname(), *_device(device),
                      (_own_address(), door.getsockname()[1]))
        store.set(f"report/{rank}", json.dumps(asdict(mine)))
        if rank == 0:
            verdict = _preside(world, store, seconds)
            store.set("verdict", json.dumps(verdict))
        else:
            _answer_roll_call(rank, store, seconds)
        verdict = json.loads(_get(store, "verdict", seconds + 2 * REACH_SECONDS))
    store.set(f"read/{rank}", "")
    if verdict["fault"]:
        if rank == 0:  # who keeps the store leaves last
            _wait_for(store, [f"read/{r}" for r in range(world)], 5.0)
        raise Unhealthy(verdict["fault"])
    return verdict["said"]


def _preside(world: int, store: dist.Store, seconds: float) -> dict[str, str]:
    """Rank 0's part: the roll call, the clocks, the neighbors."""
    missing, spread = _await_reports(world, store, seconds)
    if missing:
        store.set("roll call", json.dumps([]))
        hosts = hosts_of_ranks()
        named = ", ".join(f"{r} on {hosts[r]}" if r in hosts else str(r) for r in missing[:16])
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        return {"said": "", "fault": (
            f"{len(missing)} of {world} ranks did not report within "
            f"fault_tolerance.join_seconds={seconds:g}: rank {named}{more}. Look at these nodes "
            "(sinfo -R, tools/doctor.py), exclude them (sbatch --exclude), or raise the limit")}
    reports = [Report(**json.loads(store.get(f"report/{r}"))) for r in range(world)]
    asked = time.time()
    store.set("roll call", json.dumps(addresses(reports)))
    _answer_roll_call(0, store, seconds)
    _wait_for(store, [f"answer/{r}" for r in range(world)], 2 * REACH_SECONDS)
    ended = time.time()
    faults, skews = [], []
    for report in reports:
        if not store.check([f"answer/{report.rank}"]):
            faults.append(f"rank {report.rank} on {report.host} reported and then fell silent")
            skews.append(0.0)
            continue
        answer = json.loads(store.get(f"answer/{report.rank}"))
        skews.append(min(0.0, answer["clock"] - asked) + max(0.0, answer["clock"] - ended))
        if answer["fault"]:
            there = reports[(report.rank + 1) % world]
            address = "{}:{}".format(*addresses(reports)[there.rank])
            faults.append(f"rank {report.rank} on {report.host} cannot reach rank {there.rank} on "
                          f"{there.host} at {address} ({answer['fault']})")
    if faults:
        return {"said": "", "fault": "; ".join(faults)
                + ". Look at the network between these nodes and their "
                                                         "firewalls; launch/common.sh says which "
                                                         "interface is used"}
    return {"said": render(reports, skews, spread), "fault": ""}


def addresses(reports: Sequence[Report]) -> list[tuple[str, int]]:
    """Where each rank can be reached. To a head node that has its own name as a loopback address,
    as Debian's /etc/hosts has it, the way from there leads to itself; others know it by name."""
    several = len({r.host for r in reports}) > 1
    return [(r.host, r.address[1]) if several and r.address[0].startswith("127.")
            else tuple(r.address)
            for r in reports]


def _await_reports(world: int, store: dist.Store, seconds: float) -> tuple[list[int],
                                                                           tuple[float, int]]:
    """The ranks that did not report in time, and by how much the last to come was behind the
    first."""
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
                  f"{said - began:.0f} s",
                  file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    return waiting, (time.monotonic() - first, last)


def _answer_roll_call(rank: int, store: dist.Store, seconds: float) -> None:
    """The time of this host's clock as soon as it is asked for, then whether the next rank is
    within reach."""
    addresses = json.loads(_get(store, "roll call", seconds + REACH_SECONDS))
    if not addresses:
        return
    clock, fault = time.time(), ""
    try:
        socket.create_connection(tuple(addresses[(rank + 1) % len(addresses)]),
                                 timeout=REACH_SECONDS).close()
    except OSError as error:
        fault = str(error)
    store.set(f"answer/{rank}", json.dumps({"clock": clock, "fault": fault}))


def render(reports: Sequence[Report], skews: Sequence[float], spread: tuple[float, int]) -> str:
    """A line for each host, then what is out of the ordinary.

    Args:
        skews: seconds by which each rank's clock is off at least, seen from rank 0.
        spread: seconds between the first report and the last, and whose that was.
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
    lines.append(f"all {len(reports)} ranks reported within {seconds:.1f} s, rank {last} last")
    usual = statistics.median(r.free for r in reports)
    lines += [f"warning: rank {r.rank} on {r.host} has {r.free / 2**30:,.1f} GiB free, others "
              f"{usual / 2**30:,.1f}; is another process on that device?" for r in reports
              if r.device != "cpu" and r.free < FREE_SHARE * usual]
    return "\n".join(lines)


def hosts_of_ranks(env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """Rank -> host of an srun step in block distribution; empty where there is none."""
    nodes, tasks = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_STEP_TASKS_PER_NODE")
    if not nodes or not tasks or not shutil.which("scontrol"):
        return {}
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True,
                           text=True, check=False)
    return dict(enumerate(host for host,
                          n in zip(shown.stdout.split(), tasks_per_node(tasks), strict=False)
                          for _ in range(n)))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, `8(x2),4` -> [8, 8, 4]."""
    return [int(n) for n,
            times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _span(ranks: list[int]) -> str:
    whole = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _device(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    return "cpu", psutil.virtual_memory().available


def _own_address() -> str:
    """The address of the interface that leads to the head node, whatever the host's name resolves
    to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # sends nothing
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


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
    """Until all keys are there, or for so long."""
    end = time.monotonic() + seconds
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(POLL_SECONDS / 5)
