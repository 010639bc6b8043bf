"""Stages of a run, and FLOPs of training."""
