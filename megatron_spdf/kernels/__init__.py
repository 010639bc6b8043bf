"""Between a compact vector and the dense weight it stands for: `dispatch` picks the
implementation."""
