"""Ranks that do not see what rank 0 has written are named, on all ranks alike."""

from __future__ import annotations

import socket
import time

import pytest

from megatron_spdf.checkpoint import shared_files
from megatron_spdf.checkpoint.shared_files import (
    NotSharedFilesystem,
    await_everywhere,
    check_shared,
    newest_of_all,
)

HOST = socket.gethostname()


@pytest.fixture
def ranks(monkeypatch):
    """Makes this process one of some ranks, of which others, by number, see nothing."""
    def make(world: int, rank: int = 0, blind: tuple[int, ...] = (), found: str | None = None):
        def gather(there: list[str], mine: str) -> None:
            there[:] = [f"rank {r} on n{r}" if r in blind else "" for r in range(world)]
            there[rank] = mine

        def broadcast(shared: list, src: int) -> None:
            assert src == 0
            if rank:
                shared[0] = found

        monkeypatch.setattr(shared_files, "PATIENCE", 0.2)
        monkeypatch.setattr(shared_files.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(shared_files.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(shared_files.dist, "all_gather_object", gather)
        monkeypatch.setattr(shared_files.dist, "broadcast_object_list", broadcast)
    return make


@pytest.mark.parametrize(("count", "more"), [(1, ""), (8, ""), (9, " and 1 more"),
                                             (11, " and 3 more")])
def test_eight_ranks_are_named_and_others_counted(ranks, tmp_path, count, more):
    ranks(12, blind=tuple(range(1, count + 1)))
    named = ", ".join(f"rank {r} on n{r}" for r in range(1, min(count, 8) + 1))
    with pytest.raises(NotSharedFilesystem) as refused:
        await_everywhere(tmp_path)
    assert str(refused.value).startswith(f"{named}{more} cannot see {tmp_path}, which rank 0 can;")


def test_a_rank_waits_for_what_comes_late_and_says_what_does_not(ranks, tmp_path, monkeypatch):
    ranks(2, rank=1)
    late, slept = tmp_path / "late", []
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or late.touch())
    await_everywhere(late)
    assert slept == [0.1]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(NotSharedFilesystem, match=f"^rank 1 on {HOST} cannot see"):
        await_everywhere(tmp_path / "never")


def test_the_newest_checkpoint_is_the_one_that_rank_0_sees(ranks, tmp_path):
    ranks(2)
    assert newest_of_all(tmp_path / "nothing") is None
    for name in ("step_00000002", "step_00000010", "step_00000012.partial"):
        (tmp_path / name).mkdir()
    assert newest_of_all(tmp_path) == tmp_path / "step_00000010"
    ranks(2, rank=1, found="step_00000002")
    assert newest_of_all(tmp_path) == tmp_path / "step_00000002"
    ranks(2, rank=1, found="step_00000007")
    with pytest.raises(NotSharedFilesystem, match="step_00000007"):
        newest_of_all(tmp_path)


def test_a_directory_is_tried_with_a_file_that_goes_again(ranks, tmp_path):
    ranks(3)
    check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    ranks(3, blind=(2,))
    with pytest.raises(NotSharedFilesystem, match=rf"^rank 2 on n2 cannot see {tmp_path}/\."):
        check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotSharedFilesystem, match="nothing cannot be written: .*; make room, or"):
        check_shared(tmp_path / "nothing")
