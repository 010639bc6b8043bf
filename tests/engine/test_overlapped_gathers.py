"""Parameters of a rank are up to date before anybody looks at them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_spdf.engine.megatron import MegatronEngine


@pytest.mark.parametrize("overlapped", [True, False])
def test_gathers_that_overlap_are_waited_for(overlapped):
    """A sync that is not forced only starts a gather, which ends in the next forward pass."""
    asked = []
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(overlap_param_gather=overlapped),
                            start_param_sync=lambda force_sync=False: asked.append(force_sync))
    MegatronEngine._gather_parameters(SimpleNamespace(chunks=[chunk, chunk]))
    assert asked == [True, True] * overlapped
