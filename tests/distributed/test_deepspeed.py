"""The DeepSpeed engine against the Megatron-Core engine: the same losses, gradient norms, masks and checkpoints."""

import pytest

pytestmark = pytest.mark.slow

STEPS = 8
STAGES = range(4)
