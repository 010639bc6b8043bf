"""What is sparse: the plan, the masks, the compact weight, and the way back to dense.

The parameter of a sparse layer is the vector of its active values; the engines never see a masked
weight.
"""
