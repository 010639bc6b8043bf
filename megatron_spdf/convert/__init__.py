"""Foreign checkpoint formats, both ways, and new runs from given weights."""
