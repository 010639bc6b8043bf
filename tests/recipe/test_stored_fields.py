"""Defaults and bounds of all fields are the stored ones, which `stored_fields.py` stores."""

from __future__ import annotations

from stored_fields import STORED, lines


def test_defaults_and_bounds_are_the_stored_ones():
    """A new field is stored too, so that nobody changes its default unaware."""
    stored, found = STORED.read_text().splitlines(), lines()
    assert len(stored) > 150 and not set(stored) - set(found)
    assert not set(found) - set(stored), "run python tests/recipe/stored_fields.py"
