"""A run that gets nowhere is started a bounded number of times."""

from __future__ import annotations

import pytest

from megatron_spdf.resilience.restarts import (
    RestartLimit,
    count_start,
    newest_step,
    restart_refusal,
)


def checkpoint(run, step):
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def test_starts_without_a_checkpoint_are_bounded(tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        count_start(run, 3, job="7")
        assert restart_refusal(run) == ""
    count_start(run, 3, job="7")
    assert (
        "3 starts in a row (fault_tolerance.max_starts=3) made no checkpoint after step 0"
        in restart_refusal(run)
    )
    with pytest.raises(RestartLimit, match="3 starts in a row"):
        count_start(run, 3, job="7")


def test_a_new_checkpoint_counts_from_one(tmp_path):
    for step in (4, 8, 12):
        count_start(tmp_path, 1, job="7")
        checkpoint(tmp_path, step)
        assert restart_refusal(tmp_path) == ""
    count_start(tmp_path, 1, job="7")
    assert "after step 12" in restart_refusal(tmp_path)


def test_a_save_that_did_not_finish_is_no_progress(tmp_path):
    checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "step_00000008.partial").mkdir()
    assert newest_step(tmp_path) == 4


def test_a_new_job_counts_from_one(tmp_path):
    count_start(tmp_path, 1, job="7")
    count_start(tmp_path, 1, job="8")
    with pytest.raises(RestartLimit):
        count_start(tmp_path, 1, job="8")


def test_a_count_cut_short_by_a_crash_is_forgotten(tmp_path):
    (tmp_path / "starts.json").write_text('{"job": "7", "st')
    count_start(tmp_path, 1, job="7")
    assert restart_refusal(tmp_path)


def test_the_count_does_not_make_a_directory_another_recipes(recipe):
    from megatron_spdf.runs.run_dir import RunDir

    run = RunDir(recipe())
    run.preflight()
    run.check()
    (run.root / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not a run directory"):
        run.check()


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/further"])
def test_an_output_that_cannot_be_written_is_refused(recipe, tmp_path, place):
    from megatron_spdf.runs.run_dir import RunDir

    (tmp_path / "file").write_text("")
    run = RunDir(recipe(output=str(tmp_path / place)))
    with pytest.raises(ValueError, match="choose another output"):
        run.check()
    with pytest.raises(ValueError, match="cannot be written.*choose another output"):
        run.preflight()
    with pytest.raises(ValueError, match="cannot be written.*choose another output"):
        run.create()
