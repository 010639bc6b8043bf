"""Checkpoints that cannot be written, and checkpoints that were damaged afterwards."""

import socket

import pytest
from cases import damaged, failing_save, saved_behind, saved_first, unshared

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(parallel={"data": 2})


@pytest.mark.parametrize("rank", [0, 1])
def test_every_damage_to_every_file_is_named_on_every_rank(ranks, recipe, rank):
    said = ranks(2).run_all(damaged, recipe)[rank]
    kinds = {name.rsplit(".", 1)[-1] for name, _ in said}
    assert kinds >= {"distcp", "metadata", "json", "pt"} and len(said) >= 3 * 9
    for (name, damage), error in said.items():
        assert name in error, (name, damage, error)
        assert "Remove this checkpoint" in error or "use another checkpoint" in error


def test_a_save_before_the_first_update_changes_no_step(ranks, recipe):
    saved, not_saved = (ranks(2).run(saved_first, recipe, saves) for saves in (True, False))
    assert saved == not_saved


@pytest.mark.parametrize("rank", [0, 1])
def test_a_directory_that_ranks_do_not_share_is_refused_before_it_holds_half_a_checkpoint(
    ranks, recipe, rank
):
    at_start, of_save, left, of_restore = ranks(2).run_all(unshared, recipe)[rank]
    assert (
        f"rank 1 on {socket.gethostname()} cannot see" in at_start
        and "file system that all nodes share" in at_start
    )
    assert "rank 0 does not see __1_" in of_save and "all nodes share" in of_save
    assert left == "[]"
    assert "rank 1" in of_restore and "step_00000002" in of_restore


@pytest.mark.parametrize("culprit", [1, 0])
def test_a_failed_write_names_the_rank_and_leaves_what_was_there(ranks, recipe, culprit):
    for found in ranks(2).run_all(failing_save, recipe, culprit):
        error, there, in_a_row = found[2]
        assert f"rank {culprit} on {socket.gethostname()}: " in error
        assert "bytes are free at" in error
        assert there == ["step_00000001"] and in_a_row == 1
        error, there, in_a_row = found[3]
        assert error == "None" and there == ["step_00000001", "step_00000003"] and in_a_row == 0
        assert found["resumed"] == 3


@pytest.mark.parametrize("sections", [
    {"parallel": {"data": 2}}, {"parallel": {"data": 2, "zero_stage": 0}},
    {"parallel": {"data": 2}, "sparsity": 0.0}], ids=str)
def test_steps_taken_meanwhile_do_not_get_into_the_checkpoint(ranks, make_recipe, sections):
    assert ranks(2).run(saved_behind, make_recipe(**sections)) == {
        "early": True, "on disk": ["step_00000002.partial"], "path": "step_00000002",
        "changed": True,
        "restored": True, "again": True}
