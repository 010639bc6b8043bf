"""Formats of others, both ways."""
