"""Process groups, traffic counts, and the stand-in for CUDA on machines without a GPU."""
