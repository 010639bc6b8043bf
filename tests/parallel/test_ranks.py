"""Ranks: read from torchrun, srun or nobody, and a world of the wrong size is refused."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.parallel import ranks as joining
from megatron_spdf.parallel.ranks import _rendezvous
from megatron_spdf.recipe.recipe import Parallel
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks, check_world, find_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_JOB_ID": "42", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "2"}


def test_torchrun():
    assert find_ranks(TORCHRUN) == Ranks(3, 8, 1, "torchrun")


@pytest.mark.parametrize("step", ["SLURM_STEP_ID", "SLURM_STEPID"])
def test_srun_step(step):
    assert find_ranks({**SBATCH, step: "0", "SLURM_PROCID": "5",
                       "SLURM_LOCALID": "2"}) == Ranks(5, 16, 2, "srun")


def test_plain_start():
    assert find_ranks({"PATH": "/bin"}) == Ranks(0, 1, 0, "python")


def test_sbatch_script_without_srun_is_a_plain_start():
    assert find_ranks(SBATCH) == Ranks(0, 1, 0, "python")


@pytest.mark.parametrize("change", [{"RANK": "8"}, {"RANK": "-1"}, {"LOCAL_RANK": "9"},
                                    {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}])
def test_ranks_out_of_the_world_are_refused(change):
    with pytest.raises(ValueError, match="ranks are counted from 0"):
        find_ranks({**TORCHRUN, **change})


@pytest.mark.parametrize("port", ["", "abc", "0", "65536", "-1", "80 "])
def test_a_port_that_is_none_is_refused(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match="is no port; export MASTER_PORT"):
        _rendezvous(Ranks(0, 2, 0, "test"), 1.0)


def test_a_network_interface_that_is_not_there_is_refused_before_ranks_join(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0")])
    for named in ("", "lo", "ib0,lo"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
        joining._require_interfaces()
    for named in ("eth0", "ib0,eth0", "ib"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", named)
        for join in (joining.init_gloo, lambda ranks: joining.init_distributed(ranks, None)):
            with pytest.raises(ValueError, match="has no network interface '(eth0|ib)', only lo, "):
                join(Ranks(0, 2, 0, "test"))


def test_torchrun_inside_a_slurm_job():
    assert find_ranks({**SBATCH, **TORCHRUN}) == Ranks(3, 8, 1, "torchrun")


def test_torchrun_inside_an_srun_step():
    assert find_ranks({**SRUN, **TORCHRUN}) == Ranks(3, 8, 1, "torchrun")


@pytest.mark.parametrize("launcher, env", [("torchrun", TORCHRUN), ("srun", SRUN)])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_half_set_variables_are_refused(launcher, env, position):
    keys = list(TORCHRUN) if launcher == "torchrun" else ["SLURM_PROCID", "SLURM_NTASKS",
                                                          "SLURM_LOCALID"]
    missing = keys[position]
    with pytest.raises(ValueError) as caught:
        find_ranks({k: v for k, v in env.items() if k != missing})
    message = str(caught.value)
    assert (
        message.startswith(f"{launcher} set ")
        and f"not {missing}" in message
        and "start with" in message
    )


def test_environment_is_the_default(monkeypatch):
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert find_ranks() == Ranks(3, 8, 1, "torchrun")


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2, "data": 2}])
def test_world_of_the_right_size_passes(layout):
    parallel = Parallel(**layout)
    check_world(Ranks(0, parallel.world, 0, "torchrun"), parallel)


def test_silent_world_of_one_is_refused_with_both_sizes_and_the_remedy():
    with pytest.raises(ValueError) as caught:
        check_world(Ranks(0, 1, 0, "python"), Parallel(tensor=2, pipeline=2, data=4))
    for part in ("needs 16 processes", "tensor 2 x pipeline 2 x data 4", "python started 1",
                 "torchrun --nproc-per-node", "srun --ntasks 16"):
        assert part in str(caught.value)
    assert "parallel.data=" not in str(caught.value)


def test_data_parallel_degree_that_fits_is_named():
    with pytest.raises(ValueError,
                       match=r"needs 8 processes.*torchrun started 4; .* or set parallel\.data=2"):
        check_world(Ranks(0, 4, 0, "torchrun"), Parallel(tensor=2, data=4))


@pytest.fixture
def head(monkeypatch):
    """Sets MASTER_ADDR and MASTER_PORT, which meeting sets too."""
    def head(address: str, port: int) -> None:
        for key, value in {"MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": "",
                           "WORLD_SIZE": ""}.items():
            monkeypatch.setenv(key, value)
    return head


def test_a_head_node_that_cannot_be_resolved_is_named_with_the_remedy(head):
    head("no.such.host.invalid", 29999)
    with pytest.raises(ValueError,
                       match=r"head node 'no.such.host.invalid' cannot be resolved .* export "
                             r"MASTER_ADDR="):
        _rendezvous(Ranks(1, 2, 1, "srun"), 1.0)


def test_a_busy_port_is_named_with_the_remedy(head):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        head("127.0.0.1", port)
        with pytest.raises(ValueError,
                           match=rf"port {port} cannot .*; export MASTER_PORT=<a free port>"):
            _rendezvous(Ranks(0, 2, 0, "srun"), 1.0)


def test_a_head_node_that_does_not_answer_is_named(head):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    head("127.0.0.1", port)
    with pytest.raises(Unhealthy, match=rf"rank 1 on .* cannot reach rank 0 at 127.0.0.1:{port}"):
        _rendezvous(Ranks(1, 2, 1, "srun"), 1.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_what_the_startup_check_found_before_groups_are_made(recipe, rank, monkeypatch,
                                                                         capsys):
    asked, made = [], []
    check = joining.startup_check
    monkeypatch.setattr(joining, "_rendezvous", lambda *_: joining.dist.HashStore())
    monkeypatch.setattr(check, "check_in", lambda *given: asked.append(given) or "2 ranks here")
    monkeypatch.setattr(joining.dist, "init_process_group",
                        lambda backend, **named: made.append((backend, named, capsys.readouterr())))
    monkeypatch.setattr(joining, "set_up_groups", made.append)
    wanted = recipe(parallel={"data": 2, "timeout": 77}, fault_tolerance={"join_seconds": 12})
    device = joining.init_distributed(Ranks(rank, 2, 0, "torchrun"), wanted)
    ((at, world, _, there, seconds),) = asked
    assert (at, world, there, seconds) == (rank, 2, device, 12)
    (backend, named, printed), last = made
    assert printed.out == ("" if rank else "2 ranks here\n") and last == wanted
    assert (backend, named["rank"], named["world_size"], named["timeout"].total_seconds()) == (
        "gloo", rank, 2, 77)


def test_a_rank_waits_six_hours_for_anothers_share_of_an_evaluation(monkeypatch):
    asked, store = [], joining.dist.HashStore()
    store.set("here/0", "")
    monkeypatch.setattr(joining, "_rendezvous", lambda ranks, seconds: store)
    monkeypatch.setattr(joining.dist, "PrefixStore", lambda name, store: (name, store))
    monkeypatch.setattr(joining.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(joining.dist, "init_process_group",
                        lambda backend, **settings: asked.append((backend, settings)))
    assert joining.init_gloo(Ranks(0, 1, 0, "python")).type == "cpu" and not asked
    joining.init_gloo(Ranks(1, 2, 1, "torchrun"))
    assert asked == [("gloo", {"store": ("groups", store), "rank": 1, "world_size": 2,
                               "timeout": timedelta(hours=6)})]


def test_but_not_for_one_that_does_not_come(monkeypatch):
    store = joining.dist.HashStore()
    store.set("here/2", "")
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.2)
    with pytest.raises(ValueError, match="rank 1, 3 of 4 did not come within 0.2 s; look at what"):
        joining._await_all(Ranks(0, 4, 0, "python"), store)


@pytest.mark.parametrize(("job", "port"), [(None, "20000"), ("0", "20000"), ("19999", "39999"),
                                           ("20000", "20000"), ("123456", "23456")])
def test_a_port_follows_from_the_job(monkeypatch, job, port):
    for key in ("MASTER_PORT", "SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    joining._find_head_node(Ranks(0, 2, 0, "srun"))
    assert os.environ["MASTER_PORT"] == port


@pytest.mark.parametrize(("visible", "launcher", "local", "found"), [
    (2, "torchrun", 1, 1), (2, "torchrun", 2, None), (1, "srun", 1, 0), (1, "torchrun", 1, None),
    (1, "torchrun", 0, 0), (2, "srun", 1, 1)])
def test_each_process_of_a_node_has_a_gpu(monkeypatch, visible, launcher, local, found):
    taken = []
    monkeypatch.setattr(joining.torch, "cuda", SimpleNamespace(
        is_available=lambda: True, device_count=lambda: visible,
        set_device=lambda device: taken.append(device)))
    ranks = Ranks(local, 4, local, launcher)
    if found is None:
        with pytest.raises(ValueError, match=f"local rank {local} has no GPU: {visible} visible"):
            joining._device(ranks)
    else:
        assert joining._device(ranks).index == found and taken == [found]


@pytest.mark.parametrize(("rank", "device", "backend"), [(0, "cpu", "gloo"), (1, "cuda", "nccl")])
def test_rank_0_says_who_is_there(monkeypatch, capsys, recipe, rank, device, backend):
    made, joined = recipe(parallel={"data": 2, "timeout": 77}), []
    monkeypatch.setattr(joining, "_device", lambda ranks: torch.device(device))
    monkeypatch.setattr(joining, "_rendezvous", lambda ranks, seconds: "store")
    monkeypatch.setattr(joining.dist, "PrefixStore", lambda name, store: (name, store))
    monkeypatch.setattr(joining.startup_check, "check_in", lambda *arguments: "all are there")
    monkeypatch.setattr(joining.dist, "init_process_group",
                        lambda backend, **settings: joined.append((backend, settings)))
    monkeypatch.setattr(joining, "set_up_groups", lambda recipe: joined.append(recipe))
    joining.init_distributed(Ranks(rank, 2, rank, "torchrun"), made)
    assert capsys.readouterr().out == ("all are there\n" if rank == 0 else "")
    assert joined == [(backend, {"store": ("groups", "store"), "rank": rank, "world_size": 2,
                                "timeout": timedelta(seconds=77)}), made]


@pytest.mark.parametrize(("rank", "agent", "restarts", "hosts"), [
    (0, None, None, True), (1, None, "2", False), (0, "True", "2", False), (0, "False", "0", True)])
def test_rank_0_hosts_the_store_unless_torchruns_agent_does(monkeypatch, head, rank, agent,
                                                            restarts, hosts):
    """Each start of torchrun has keys of its own."""
    head("127.0.0.1", 29999)
    for key, value in {"TORCHELASTIC_USE_AGENT_STORE": agent,
                       "TORCHELASTIC_RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(key, value or "")
        if value is None:
            monkeypatch.delenv(key)
    asked = []
    monkeypatch.setattr(joining.dist, "TCPStore",
                        lambda *place, **settings: asked.append((place, settings)))
    monkeypatch.setattr(joining.dist, "PrefixStore", lambda name, store: name)
    assert joining._rendezvous(Ranks(rank, 2, rank, "srun"), 7.0) == f"start {restarts or 0}"
    assert asked == [(("127.0.0.1", 29999), {"is_master": hosts, "wait_for_workers": False,
                                            "timeout": timedelta(seconds=7)})]
