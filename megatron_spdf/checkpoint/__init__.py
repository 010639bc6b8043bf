"""Checkpoints: a directory that is complete or not there, in Megatron-Core's distributed format."""
