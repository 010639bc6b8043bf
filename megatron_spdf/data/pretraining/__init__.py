"""Order of training tokens: sources, their blend, and batches read by position."""
