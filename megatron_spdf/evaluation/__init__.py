"""Quality of a model: validation loss, decoding, task metrics, and checks of its weights."""
