"""The engines: what executes a training step."""
