"""Checkpoints: directories that are complete or absent, in Megatron-Core's distributed format."""
