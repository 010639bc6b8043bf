"""Checkpoints that cannot be written, and checkpoints that were damaged afterwards."""

import socket

import pytest
from harness import outcome, run_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(make_recipe, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")

    def recipe(name: str, **sections) -> dict:
        return make_recipe(str(runs / name), parallel={"data": 2}, **sections)

    return run_cases(2, {
        "damaged": ("damaged", {"recipe": recipe("damaged")}),
        "second rank": ("failing_save", {"recipe": recipe("second"), "rank": 1}),
        "first rank": ("failing_save", {"recipe": recipe("first"), "rank": 0}),
        **{f"saved first: {saves}": ("saved_first",
                                     {"recipe": recipe(f"saved {saves}"), "saves": saves})
           for saves in (True, False)},
        "unshared": ("unshared", {"recipe": recipe("unshared"),
                                  "places": [str(runs / f"of rank {r}") for r in (0, 1)]}),
        "behind": ("saved_behind", {"recipe": recipe("behind")}),
        "behind zero 0": ("saved_behind", {"recipe": make_recipe(
            str(runs / "behind0"), parallel={"data": 2, "zero_stage": 0})}),
        "behind dense": ("saved_behind", {"recipe": recipe("behind dense", sparsity=0.0)}),
    }, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_damage_to_every_file_is_named_on_every_rank(results, rank):
    said = outcome(results, "damaged", rank)
    kinds = {name.rsplit(".", 1)[-1] for name, _ in said}
    assert kinds >= {"distcp", "metadata", "json", "pt"} and len(said) >= 3 * 9
    for (name, damage), error in said.items():
        assert name in error, (name, damage, error)
        assert "Remove it" in error or "use another checkpoint" in error


def test_a_save_before_the_first_update_changes_no_step(results):
    assert outcome(results, "saved first: True") == outcome(results, "saved first: False")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_directory_that_ranks_do_not_share_is_refused_before_it_holds_half_a_checkpoint(
    results, rank
):
    at_start, of_save, left, of_restore = outcome(results, "unshared", rank)
    assert (
        f"rank 1 on {socket.gethostname()} cannot see" in at_start
        and "file system that all nodes share" in at_start
    )
    assert "rank 0 does not see __1_" in of_save and "all nodes share" in of_save
    assert left == "[]"
    assert "rank 1" in of_restore and "step_00000002" in of_restore


@pytest.mark.parametrize("name, culprit", [("second rank", "rank 1"), ("first rank", "rank 0")])
def test_a_failed_write_names_the_rank_and_leaves_what_was_there(results, name, culprit):
    for rank in range(2):
        found = outcome(results, name, rank)
        error, there, in_a_row = found[2]
        assert f"{culprit} on {socket.gethostname()}: " in error and "bytes are free at" in error
        assert there == ["step_00000001"] and in_a_row == 1
        error, there, in_a_row = found[3]
        assert error == "None" and there == ["step_00000001", "step_00000003"] and in_a_row == 0
        assert found["resumed"] == 3


@pytest.mark.parametrize("name", ["behind", "behind zero 0", "behind dense"])
def test_steps_taken_meanwhile_do_not_get_into_the_checkpoint(results, name):
    assert outcome(results, name) == {
        "early": True, "on disk": ["step_00000002.partial"], "path": "step_00000002",
        "changed": True,
        "restored": True, "again": True}
