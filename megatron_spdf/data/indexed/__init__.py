"""Megatron's indexed data sets on disk."""
