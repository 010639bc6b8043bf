"""Scaling law of sparse models: its form and its fit."""
