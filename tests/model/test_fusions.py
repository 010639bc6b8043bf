"""Megatron-Core's fusions, where torch.compile cannot be had; and what a run says before its first
line."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_spdf.model import decoder


@pytest.mark.parametrize(("gated", "activation", "biases", "plain", "uncompiled", "compiled"), [
    (True, "silu", False, True, False, True),  # the CPU has SwiGLU as it is
    (True, "silu", True, True, False, True),
    (True, "gelu", True, False, False, False),
    (False, "silu", True, False, False, False),
    (False, "gelu", True, False, False, True),
    (False, "gelu", False, False, False, False),
    (False, "relu", True, False, False, False)])
def test_an_activation_is_fused_where_megatron_core_has_it(monkeypatch, gated, activation, biases,
                                                           plain, uncompiled, compiled):
    """Without a GPU, with one but no compiler, and with both."""
    model = SimpleNamespace(gated=gated, activation=activation, biases=biases)

    def fuses(gpu: bool, compiles: bool) -> bool:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return decoder._fuses_activation(model, compiles)

    assert (fuses(False, False), fuses(True, False), fuses(True, True)) == (plain, uncompiled,
                                                                            compiled)


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


@pytest.mark.slow
def test_engines_say_nothing_while_they_are_imported(monkeypatch):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    done = subprocess.run([sys.executable, "-c",
                           "import megatron_spdf.engine.megatron, megatron_spdf.model.decoder"],
                          capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
