"""Defaults and bounds of all fields are the stored ones, which `stored_fields.py` stores."""

from __future__ import annotations

from stored_fields import STORED, lines


def test_defaults_and_bounds_are_the_stored_ones():
    """New fields are none of its business."""
    stored = STORED.read_text().splitlines()
    assert len(stored) > 150 and not set(stored) - set(lines())
