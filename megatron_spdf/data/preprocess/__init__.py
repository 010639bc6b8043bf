"""From text to indexed data sets."""
