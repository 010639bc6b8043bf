"""Ranks from srun or torchrun, process groups, traffic counts, and the CPU stand-in for CUDA."""
