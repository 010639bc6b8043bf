"""What runs on the ranks of test_engine.py, which know the engine of plain_engine.py."""

import plain_engine  # noqa: F401
from cases import cut, planned_traffic, train

__all__ = ["cut", "planned_traffic", "train"]
