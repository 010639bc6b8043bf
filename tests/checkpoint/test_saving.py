"""A save that has got its name is no failed save, whatever becomes of the older ones."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.saving import SaveThread


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def save(tmp_path, group, after, add_files=lambda partial: None) -> SaveThread:
    thread = SaveThread(tmp_path / "step_00000002.partial", {}, add_files, after, group,
                        validate=False)
    thread.start()
    thread.join()
    return thread


def test_a_failed_clean_up_is_no_failed_save(tmp_path, group):
    def fail() -> list[str]:
        raise PermissionError("Permission denied")
    thread = save(tmp_path, group, fail)
    assert thread.error is None and thread.said == ["could not tidy up: Permission denied"]
    store.verify(tmp_path / "step_00000002")


def test_what_could_not_be_removed_is_passed_on(tmp_path, group):
    assert save(tmp_path, group, lambda: ["could not remove it"]).said == ["could not remove it"]


@pytest.mark.parametrize("planted", ["link", "file", "directory"])
def test_what_has_the_name_of_the_save_in_the_making_is_removed(tmp_path, group, planted):
    place, victim = tmp_path / "step_00000002.partial", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    {"link": lambda: place.symlink_to(victim), "file": place.touch, "directory": place.mkdir}[
        planted]()
    assert save(tmp_path, group, list).error is None
    assert [path.name for path in victim.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # torch.save has the second, too
def test_a_failed_write_names_its_rank_and_leaves_nothing(tmp_path, group, kind):
    def fail(partial):
        (partial / "begun").touch()
        raise kind("no room")
    failed = save(tmp_path, group, list, fail)
    assert str(failed.error) == f"rank 0 on {socket.gethostname()}: no room"
    assert not list(tmp_path.iterdir())
