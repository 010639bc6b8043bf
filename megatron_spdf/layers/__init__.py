"""How a sparse layer computes."""
