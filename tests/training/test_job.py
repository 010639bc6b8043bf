"""Errors that a user can put right end a run with a sentence and their exit code."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from megatron_spdf.checkpoint.shared_files import NotSharedFilesystem
from megatron_spdf.data.indexed.tokens import NoToken
from megatron_spdf.resilience.restarts import RestartLimit
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.training.job import refusals


@pytest.mark.parametrize(("kind", "code"), [
    (ValueError, 2), (FileNotFoundError, 2), (NotSharedFilesystem, 2), (NoToken, 2),
    (RestartLimit, 3), (Unhealthy, 4)])
def test_a_refusal_has_an_exit_code_and_a_line(kind, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/there/pretrain.py"])
    with pytest.raises(SystemExit) as ended, refusals():
        raise kind("what is wrong")
    assert ended.value.code == code
    assert capsys.readouterr().err == "pretrain.py: what is wrong\n"


def test_other_errors_keep_their_trace():
    with pytest.raises(KeyError), refusals():
        raise KeyError("a fault of the program")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR,
                                    errno.ELOOP, errno.ENOSPC])
def test_a_path_that_a_user_can_put_right_ends_with_the_remedy(number, capsys):
    with pytest.raises(SystemExit) as ended, refusals():
        raise OSError(number, os.strerror(number), "data/train.bin")
    assert ended.value.code == 2
    assert f"data/train.bin: {os.strerror(number)}; " in capsys.readouterr().err


def test_an_error_of_a_disk_or_a_network_keeps_its_trace():
    for number in (errno.EIO, errno.ECONNREFUSED, errno.ETIMEDOUT):
        with pytest.raises(OSError), refusals():
            raise OSError(number, os.strerror(number))
