"""Megatron's indexed data sets on disk: reading, checking and describing them."""
