"""Files and directories appear whole or not at all, and nothing is written through a link."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_spdf import files
from megatron_spdf.command_line import make_parser, output_file, output_picture
from megatron_spdf.files import (
    AlreadyThere,
    atomic_directory,
    open_to_append,
    publish,
    write_file,
    write_json,
)
from megatron_spdf.locks import locked
from megatron_spdf.runs.run_dir import RunDir
from megatron_spdf.runs.run_log import RunLog


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file that nothing may change."""
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, victim):
    (tmp_path / "a").symlink_to(victim)
    write_file(tmp_path / "a", "x")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "x" and not (tmp_path / "a").is_symlink()


def test_a_link_under_the_name_before_the_name_is_not_followed(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / f"a.guessed{files.NEW}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", "x")
    assert victim.read_text() == "mine"


def test_nothing_is_appended_through_a_link(tmp_path, victim):
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "log")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "log", wait=True):
        pass
    assert victim.read_text() == "mine"


def test_a_runs_log_leaves_what_is_planted_beside_it_alone(recipe, victim):
    run = RunDir(recipe())
    run.create()
    record = json.dumps({"kind": "train", "step": 1}) + "\n"
    run.log.write_text(record)
    for name in ("log.jsonl.new", "recipe.yaml.new", "starts.json.new"):
        (run.root / name).symlink_to(victim)
    RunLog(run, 1, 2, writers=(), active=True).close()
    run.create()
    run.preflight()
    assert victim.read_text() == "mine" and run.log.read_text() == record


def test_an_output_under_a_file_or_a_link_to_nowhere_says_so(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match="file is a file; give another file"):
        files.require_writable(tmp_path / "file/page.html")
    for name, what in (("file", "is a file"), ("link", "is a link that leads nowhere")):
        with pytest.raises(ValueError, match=f"{name} {what}; choose another output"):
            files.require_directory(tmp_path / name / "run")


@pytest.mark.parametrize("there", ["nothing", "file", "directory", "loop"])
@pytest.mark.parametrize("name", ["checkpoints", "log.jsonl", "recipe.yaml", "starts.json",
                                  "lock.1", "tensorboard", "cache", "evaluation", "anything"])
def test_a_run_directory_with_a_link_that_leads_out_is_refused(recipe, tmp_path, name, there):
    run, elsewhere = RunDir(recipe()), tmp_path / "elsewhere"
    run.root.mkdir()
    (run.root / name).symlink_to(elsewhere)
    {"nothing": lambda: None, "file": elsewhere.touch, "directory": elsewhere.mkdir,
     "loop": lambda: elsewhere.symlink_to(run.root / name)}[there]()
    with pytest.raises(ValueError, match=f"{name} is a link to .*remove the link"):
        run.check()


@pytest.mark.parametrize("name", ["log.jsonl", "starts.json", "lock.1", "recipe.yaml"])
def test_a_pipe_in_a_run_directory_is_refused_and_not_waited_for(recipe, name):
    run = RunDir(recipe())
    run.root.mkdir()
    os.mkfifo(run.root / name)
    with pytest.raises(ValueError, match=f"{name} is neither a file nor a directory"):
        run.check()


@pytest.fixture
def linked(recipe, tmp_path):
    """A run whose checkpoints its user has moved to another disk and linked."""
    run = RunDir(recipe())
    run.create()
    (tmp_path / "disk" / "step_00000010").mkdir(parents=True)
    run.checkpoints.symlink_to(tmp_path / "disk")
    return run


def test_checkpoints_that_the_user_has_moved_and_linked_are_accepted(linked):
    (linked.checkpoints / "best.json").touch()
    (linked.checkpoints / "step_00000020.partial").touch()
    linked.check()


@pytest.mark.parametrize("why", ["another's link", "another run's", "none in it", "something else"])
def test_other_linked_directories_of_checkpoints_are_refused(linked, tmp_path, why, monkeypatch):
    if why == "another's link":
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        os.lchown(linked.checkpoints, 4712, -1)
    elif why == "another run's":
        (tmp_path / "recipe.yaml").touch()
    elif why == "none in it":
        (tmp_path / "disk" / "step_00000010").rmdir()
    else:
        (tmp_path / "disk" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="checkpoints is a link to .*disk"):
        linked.check()


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with atomic_directory(tmp_path / "made") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "inner" / "file").read_text() == "x"


def test_a_directory_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "made") as partial:
        (partial / "file").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_emptied_and_what_another_is_at_is_left_alone(tmp_path):
    (tmp_path / "made.partial/old").mkdir(parents=True)
    with atomic_directory(tmp_path / "made") as partial:
        assert not list(partial.iterdir())
        (partial / "first").touch()
        with (pytest.raises(ValueError, match="another process is at work in .*made.partial"),
              atomic_directory(tmp_path / "made")):
            pass
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["first"]


def test_a_pointer_of_git_lfs_is_no_file(tmp_path):
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "y").write_text("version https://example.com")
    with pytest.raises(ValueError, match="x is a pointer of Git LFS.*git lfs pull"):
        files.require_fetched(tmp_path / "x")
    for name in ("y", "nothing", "."):
        files.require_fetched(tmp_path / name)


def test_a_link_under_the_name_of_a_directory_in_the_making_is_not_filled(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "made.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "made") as partial:
        (partial / "file").write_text("x")
    assert not list((tmp_path / "victim").iterdir())


def test_a_directory_that_is_there_is_kept(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(AlreadyThere, match="old exists"), atomic_directory(tmp_path / "old"):
        pass
    with pytest.raises(AlreadyThere, match="old exists"):
        publish(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["old"]


@pytest.mark.parametrize(("name", "said"), [
    ("there", "is no ordinary file"), ("/dev/null", "is no ordinary file"),
    ("nowhere/a.json", "there is no directory"), ("victim/a.json", "victim is a file"),
    ("checkpoint/a.json", "lies in the checkpoint")])
@pytest.mark.parametrize("kind", [output_file, output_picture])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(
        tmp_path, victim, capsys, name, said, kind):
    (tmp_path / "there").mkdir()
    (tmp_path / "checkpoint").mkdir()
    for entry in (files.RUN, files.FILES):
        (tmp_path / "checkpoint" / entry).write_text("{}")
    parser = make_parser(None)
    parser.add_argument("--output", type=kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--output", str(tmp_path / name)])
    assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
    sound = [tmp_path / "new.png", tmp_path / "no_suffix", victim]
    assert [parser.parse_args(["--output", str(path)]).output for path in sound] == sound
    assert victim.read_text() == "mine" and not sound[0].exists()


def test_a_picture_of_no_format_is_refused(tmp_path, capsys):
    parser = make_parser(None)
    parser.add_argument("--png", type=output_picture)
    assert parser.parse_args(["--png", str(tmp_path / "a.svg")]).png == tmp_path / "a.svg"
    with pytest.raises(SystemExit):
        parser.parse_args(["--png", str(tmp_path / "a.xyz")])
    assert "a.xyz ends in no format of pictures; those are " in " ".join(
        capsys.readouterr().err.split())


def test_an_error_of_the_system_names_what_was_written(tmp_path, monkeypatch):
    """That of a full disk names nothing."""
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"), \
            atomic_directory(tmp_path / "out"):
        full()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a.json'"):
        write_file(tmp_path / "a.json", "x")
    assert not list(tmp_path.iterdir())
