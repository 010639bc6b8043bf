"""Which class a model's norms have."""

from __future__ import annotations

import pytest

from megatron_spdf.model import norm


@pytest.mark.parametrize(("kind", "of", "apex", "expected"), [
    ("auto", "LayerNorm", False, "LayerNorm"), ("auto", "RMSNorm", False, "RMSNorm"),
    ("auto", "LayerNorm", True, "FusedLayerNorm"), ("auto", "RMSNorm", True, "RMSNorm"),
    ("torch", "LayerNorm", True, "LayerNorm")])
def test_apex_has_layer_norms_alone(monkeypatch, kind, of, apex, expected):
    monkeypatch.setattr(norm, "have_apex", lambda: apex)
    assert norm.norm_class(kind, of).__name__ == expected
