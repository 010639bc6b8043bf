"""The loop and what stands around it: the run directory, logging, signals."""
