"""Bounds of what is read."""

MOST_BYTES = 1 << 27  # the files of the largest tokenizers have 35 MB and two million values
MOST_VALUES = 1 << 23
MOST_LINE_BYTES = 1 << 24
MOST_YAML_BYTES, MOST_YAML_VALUES = 1 << 20, 100_000  # PyYAML reads some 100 KB a second
MOST_NESTING = 64
