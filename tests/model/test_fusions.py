"""Megatron-Core's fusions, where torch.compile cannot be had; and what a run says before its first
line."""

import subprocess
import sys

import torch

from megatron_spdf.model import decoder


def test_a_gpu_without_a_compiler_does_without_fusions_and_says_so_once(monkeypatch, caplog):
    def fails(function):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment "
                           "variable.\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", fails)
    decoder._compiles.cache_clear()
    try:
        assert not decoder._compiles() and not decoder._compiles()
    finally:
        decoder._compiles.cache_clear()
    (said,) = caplog.messages
    assert said == ("bias, activation and dropout run one by one, since torch.compile does not "
                    "work here (RuntimeError: Failed to find C compiler. Please specify via CC "
                    "environment variable.)")


def test_engines_say_nothing_while_they_are_imported(monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    done = subprocess.run([sys.executable, "-c",
                           "import megatron_spdf.engine.megatron, megatron_spdf.model.decoder"],
                          capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
