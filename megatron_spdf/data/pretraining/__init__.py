"""The order of training tokens."""
