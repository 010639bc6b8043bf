"""What a run does when: its stages and the FLOPs of training."""
