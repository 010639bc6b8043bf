"""What tools/benchmark.py measures on this machine: steps and their parts, training, saves, peers;
and all at once."""
