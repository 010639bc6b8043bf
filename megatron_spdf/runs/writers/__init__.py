"""What takes the figures of a run beside log.jsonl, one file each."""
