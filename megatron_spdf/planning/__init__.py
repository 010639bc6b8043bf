"""What a run costs, by arithmetic: FLOPs, bytes per rank, peak rates of known GPUs. Pure Python."""
