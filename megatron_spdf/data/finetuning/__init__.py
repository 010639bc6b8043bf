"""Contexts and completions."""
