"""Puts the repository root on sys.path: the tools run from a checkout, without the package installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
