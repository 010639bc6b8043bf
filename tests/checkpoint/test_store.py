"""Invariant 6: a checkpoint is visible only when complete, damage is named, the newest is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_spdf.checkpoint import store
from megatron_spdf.checkpoint.reader import find_checkpoint


def write_partial(directory: Path, step: int) -> Path:
    partial = directory / (store.name_of(step) + store.PARTIAL)
    (partial / "tokenizer").mkdir(parents=True)
    (partial / "weights.distcp").write_bytes(bytes(range(256)) * 4)
    (partial / "tokenizer" / "tokenizer.json").write_text("{}")
    store.write_json(partial / store.RUN, {"state": {"step": step}})
    return partial


def save(directory: Path, step: int) -> Path:
    partial = write_partial(directory, step)
    return store.complete(partial,
                         {name: store.describe(partial / name) for name in store.files_of(partial)})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path, 500)


def test_published_checkpoint_is_complete_and_sound(tmp_path, checkpoint):
    assert checkpoint == tmp_path / "step_00000500"
    assert store.visible(tmp_path) == [checkpoint]
    assert names(tmp_path) == ["step_00000500"]
    store.verify(checkpoint)


def test_list_names_every_file_with_bytes_and_checksum(checkpoint):
    listed = json.loads((checkpoint / store.FILES).read_text())
    assert sorted(listed) == ["run.json", "tokenizer/tokenizer.json", "weights.distcp"]
    assert listed["weights.distcp"] == {
        "bytes": 1024, "sha256": "785b0751fc2c53dc14a4ce3d800e69ef9ce1009eb327ccf458afe09c242c26c9"}


def test_every_file_is_on_disk_before_the_checkpoint_is_visible(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def noted(number: int) -> None:
        synced.append((os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path),
                       bool(store.visible(tmp_path))))
        sync(number)
    monkeypatch.setattr(os, "fsync", noted)
    checkpoint = save(tmp_path, 500)
    files = json.loads((checkpoint / store.FILES).read_text())
    before = {name for name, visible in synced if not visible}
    assert {f"{checkpoint.name}.partial/{name}" for name in files} <= before


def test_the_best_one_is_the_newest_where_it_is_gone(tmp_path):
    run = tmp_path / "run"
    for step in (10, 20, 30):
        save(run / "checkpoints", step)
    for named, found in ((10, 10), (20, 20), (40, 30), (15, 30)):
        store.write_json(run / "checkpoints" / store.BEST, {"checkpoint": store.name_of(named)})
        assert find_checkpoint(run).name == store.name_of(found)
        assert find_checkpoint(run, newest=True).name == store.name_of(30)
        best = store.best(run / "checkpoints")
        assert best == (run / "checkpoints" / store.name_of(named) if found == named else None)


def test_newest_is_the_highest_step_however_they_were_written(tmp_path):
    for step in (1000, 5, 50, 999):
        save(tmp_path, step)
    assert [path.name for path in store.visible(tmp_path)] == [store.name_of(s)
                                                               for s in (5, 50, 999, 1000)]


def test_partial_is_never_chosen(tmp_path, checkpoint):
    whole = write_partial(tmp_path, 600)
    store.write_json(whole / store.FILES,
                     {name: store.describe(whole / name) for name in store.files_of(whole)})
    assert store.visible(tmp_path) == [checkpoint]


def test_directory_without_a_list_is_damaged_and_not_unfinished(tmp_path, checkpoint):
    newest = save(tmp_path, 600)  # it had a list when it got its name
    (newest / store.FILES).unlink()
    assert store.visible(tmp_path) == [checkpoint, newest]
    assert store.discard_incomplete(tmp_path) == []


def test_other_names_are_never_chosen(tmp_path, checkpoint):
    for name in ("step_700", "step_00000700_copy", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / store.FILES).write_text("{}")
    assert store.visible(tmp_path) == [checkpoint]


def test_no_directory_holds_no_checkpoint(tmp_path):
    assert store.visible(tmp_path / "none") == []
    assert store.discard_incomplete(tmp_path / "none") == []


def test_unfinished_saves_are_discarded_and_named(tmp_path, checkpoint):
    write_partial(tmp_path, 600)
    save(tmp_path, 700).rename(tmp_path / "step_00000700.partial")  # a crash while it was removed
    assert store.discard_incomplete(tmp_path) == [
        f"discarded step_00000{n}.partial, a save that did not finish" for n in (600, 700)]
    assert names(tmp_path) == ["step_00000500"]
    store.verify(checkpoint)


def test_discarding_leaves_what_a_save_did_not_write(tmp_path, checkpoint):
    (tmp_path / "step_00000500_copy").mkdir()
    (tmp_path / "step_notes.txt").write_text("mine")
    (tmp_path / "notes").mkdir()
    assert store.discard_incomplete(tmp_path) == []
    assert names(tmp_path) == ["notes", "step_00000500", "step_00000500_copy", "step_notes.txt"]


@pytest.mark.parametrize("keep, left",
                         [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_retain_keeps_the_newest(tmp_path, keep, left):
    for step in (20, 10, 30):
        save(tmp_path, step)
    store.retain(tmp_path, keep)
    assert names(tmp_path) == [store.name_of(step) for step in left]


@pytest.mark.parametrize("keep, every, left",
                         [(1, 20, [20, 40, 50]), (2, 30, [30, 40, 50]), (1, 7, [50])])
def test_retain_keeps_every_mth_step_too(tmp_path, keep, every, left):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
        store.retain(tmp_path, keep, every)
    assert names(tmp_path) == [store.name_of(step) for step in left]


def test_retain_spares_those_that_are_named(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
        store.retain(tmp_path, 1, spare={store.name_of(20), store.name_of(25)})
    assert names(tmp_path) == [store.name_of(step) for step in (20, 40)]


def test_retain_counts_no_unfinished_save(tmp_path, checkpoint):
    write_partial(tmp_path, 600)
    store.retain(tmp_path, 1)
    assert store.visible(tmp_path) == [checkpoint]


@pytest.fixture
def moved(tmp_path):
    """Moves something to another place and links it, as a user does whose disk is full."""
    def move(path: Path) -> Path:
        there = tmp_path.parent / f"{tmp_path.name}_{path.name}_elsewhere"
        path.rename(there)
        path.symlink_to(there)
        return there
    return move


def test_of_a_checkpoint_that_was_moved_and_linked_the_link_is_removed(tmp_path, moved):
    for step in (10, 20, 30):
        save(tmp_path, step)
    there = moved(tmp_path / "step_00000010")
    assert store.retain(tmp_path, 1) == []
    assert names(tmp_path) == ["step_00000030"]
    store.verify(there)


def test_of_an_unfinished_save_that_is_a_link_the_link_is_removed(tmp_path, moved, checkpoint):
    write_partial(tmp_path, 600)
    there = moved(tmp_path / "step_00000600.partial")
    (tmp_path / "step_00000700.partial").write_text("a file")
    (tmp_path / "step_00000800.partial").symlink_to("nowhere")
    assert len(store.discard_incomplete(tmp_path)) == 3
    assert names(tmp_path) == ["step_00000500"] and (there / "weights.distcp").exists()


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", "weights")
    save(tmp_path, 10)
    save(tmp_path, 20)
    monkeypatch.setattr(store, "remove", refuse)
    said = "could not remove step_00000010.partial: [Errno 13] Permission denied: 'weights'"
    assert store.retain(tmp_path, 1) == [said] and store.discard_incomplete(tmp_path) == [said]
    assert [path.name for path in store.visible(tmp_path)] == ["step_00000020"]


def test_a_checkpoint_whose_disk_is_gone_is_named(tmp_path, checkpoint):
    store.require_present(tmp_path)
    (tmp_path / "step_00000600").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="step_00000600 leads to .*disk, which is not there"):
        store.require_present(tmp_path)


def crash(*_, **__):
    raise RuntimeError("crash")


def test_crash_while_an_old_checkpoint_is_removed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 10)
    save(tmp_path, 20)
    monkeypatch.setattr(store, "remove", crash)
    with pytest.raises(RuntimeError):
        store.retain(tmp_path, 1)
    assert [path.name for path in store.visible(tmp_path)] == ["step_00000020"]


def test_crash_before_the_rename_leaves_the_previous_checkpoint_the_newest(tmp_path, checkpoint,
                                                                           monkeypatch):
    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(RuntimeError):
        save(tmp_path, 600)
    assert store.visible(tmp_path) == [checkpoint]


def test_the_same_step_is_never_overwritten(tmp_path, checkpoint):
    with pytest.raises(OSError, match="step_00000500 exists"):
        save(tmp_path, 500)
    store.verify(checkpoint)


def truncate(checkpoint: Path) -> str:
    path = checkpoint / "weights.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return "weights.distcp has 1023 bytes instead of 1024"


def append(checkpoint: Path) -> str:
    path = checkpoint / "weights.distcp"
    path.write_bytes(path.read_bytes() + b"x")
    return "weights.distcp has 1025 bytes instead of 1024"


def flip_a_byte(checkpoint: Path) -> str:
    path = checkpoint / "weights.distcp"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    return "weights.distcp has another content"


def remove(checkpoint: Path) -> str:
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    return "tokenizer/tokenizer.json is missing"


def add(checkpoint: Path) -> str:
    (checkpoint / "tokenizer" / "extra.bin").touch()
    return "tokenizer/extra.bin is not in the list"


def cut_the_list(checkpoint: Path) -> str:
    path = checkpoint / store.FILES
    path.write_text(path.read_text()[:20])
    return "files.json cannot be read"


def remove_the_list(checkpoint: Path) -> str:
    (checkpoint / store.FILES).unlink()
    return "files.json cannot be read"


DAMAGES = [truncate, flip_a_byte, remove, add, cut_the_list, remove_the_list]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(checkpoint, damage):
    fault = damage(checkpoint)
    with pytest.raises(store.DamagedCheckpoint, match=fault) as caught:
        store.verify(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_every_damaged_file_is_named_at_once(checkpoint):
    faults = [damage(checkpoint) for damage in (truncate, remove, add)]
    with pytest.raises(store.DamagedCheckpoint) as caught:
        store.verify(checkpoint)
    assert all(fault in str(caught.value) for fault in faults)


@pytest.mark.parametrize(("count", "more"), [(1, ""), (20, ""), (21, "; and 1 more"),
                                             (25, "; and 5 more")])
def test_twenty_faults_are_named_and_others_counted(checkpoint, count, more):
    for number in range(count):
        (checkpoint / f"n{number:02}").touch()
    with pytest.raises(store.DamagedCheckpoint) as damage:
        store.verify(checkpoint)
    named = "; ".join(f"n{number:02} is not in the list" for number in range(min(count, 20)))
    assert f"holds what was not saved with it: {named}{more}. Move that out" in str(damage.value)
    truncate(checkpoint)
    with pytest.raises(store.DamagedCheckpoint, match="is damaged: .*Remove this checkpoint to"):
        store.verify(checkpoint)


@pytest.mark.parametrize("damage", [truncate, append])
def test_sizes_alone_find_another_size_but_not_a_flipped_bit(checkpoint, damage):
    flip_a_byte(checkpoint)
    store.verify(checkpoint, checksums=False)
    fault = damage(checkpoint)
    with pytest.raises(store.DamagedCheckpoint, match=fault):
        store.verify(checkpoint, checksums=False)


def test_a_share_of_the_names_checks_the_content_of_those_and_the_size_of_all(checkpoint):
    flip_a_byte(checkpoint)
    store.verify(checkpoint, names=["run.json"])
    with pytest.raises(store.DamagedCheckpoint, match=r"weights\.distcp"):
        store.verify(checkpoint, names=["weights.distcp"])
    truncate(checkpoint)
    with pytest.raises(store.DamagedCheckpoint, match=r"weights\.distcp"):
        store.verify(checkpoint, names=["run.json"])


def elsewhere(path: Path) -> Path:
    """The same file outside of the checkpoint."""
    target = path.parents[1] / f"elsewhere_{path.name}"
    path.rename(target)
    return target


def link(checkpoint: Path) -> str:
    path = checkpoint / "weights.distcp"
    path.symlink_to(elsewhere(path))
    return "weights.distcp is a link and no file"


def linked_directory(checkpoint: Path) -> str:
    path = checkpoint / "tokenizer"
    path.symlink_to(elsewhere(path))
    return "tokenizer is a link and no file"


def pipe(checkpoint: Path) -> str:
    (checkpoint / "weights.distcp").unlink()
    os.mkfifo(checkpoint / "weights.distcp")
    return "weights.distcp is a pipe, socket or device and no file"


def new_pipe(checkpoint: Path) -> str:
    os.mkfifo(checkpoint / "tokenizer" / "more")
    return "tokenizer/more is a pipe, socket or device and no file"


def pipe_for_the_list(checkpoint: Path) -> str:
    (checkpoint / store.FILES).unlink()
    os.mkfifo(checkpoint / store.FILES)
    return "files.json cannot be read"


def link_for_the_list(checkpoint: Path) -> str:
    path = checkpoint / store.FILES
    path.symlink_to(elsewhere(path))
    return "files.json is a link and no file"


def device_for_the_list(checkpoint: Path) -> str:
    (checkpoint / store.FILES).unlink()
    (checkpoint / store.FILES).symlink_to("/dev/zero")
    return "files.json cannot be read"


def file_outside(checkpoint: Path) -> str:
    (checkpoint.parent / "outside").write_text("{}")
    relist(checkpoint, "../outside", store.describe(checkpoint.parent / "outside"))
    return "../outside is missing"


def file_of_the_system(checkpoint: Path) -> str:
    relist(checkpoint, "/etc/hostname", {"bytes": 1, "sha256": "0" * 64})
    return "/etc/hostname is missing"


def escape(checkpoint: Path) -> str:
    relist(checkpoint, "\033[2J", {"bytes": 1, "sha256": "0" * 64})
    return r"x1b\[2J is missing"


def no_size(checkpoint: Path) -> str:
    relist(checkpoint, "weights.distcp", {"bytes": -1, "sha256": "0" * 64})
    return "files.json cannot be read"


def relist(checkpoint: Path, name: str, entry: dict) -> None:
    listed = json.loads((checkpoint / store.FILES).read_text())
    (checkpoint / store.FILES).write_text(json.dumps(listed | {name: entry}))


@pytest.mark.parametrize("plant", [
    link, linked_directory, pipe, new_pipe, pipe_for_the_list, link_for_the_list,
    device_for_the_list, file_outside, file_of_the_system, escape, no_size])
@pytest.mark.parametrize("checksums", [True, False])
def test_what_is_no_file_of_the_checkpoint_is_refused_and_not_waited_for(checkpoint, plant,
                                                                         checksums):
    with pytest.raises(store.DamagedCheckpoint, match=plant(checkpoint)) as caught:
        store.verify(checkpoint, checksums)
    assert "\033" not in str(caught.value)
