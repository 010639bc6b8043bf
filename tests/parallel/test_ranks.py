"""Ranks: read from torchrun, srun or nobody, and a world of the wrong size is refused."""

from __future__ import annotations

import socket

import pytest

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
